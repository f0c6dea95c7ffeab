"""Pictures drawn with Pillow alone, which torchvision brings along: no plotting library is needed to train."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from pictures import sheet
from pictures.feature_maps import columns, grid
from pictures.sheet import Entry, Line

INK, GREY, PAPER = (40, 40, 40), (110, 110, 110), (255, 255, 255)
# Both ends of the ramps of the confusion matrix: right answers, wrong ones.
RIGHT = ((247, 251, 255), (8, 81, 156))
WRONG = ((255, 255, 255), (217, 72, 1))
MOST_CLASSES = 1440  # of a confusion matrix, whose sides have as many pixels at most


def confusion_matrix(matrix: Tensor, class_names: Sequence[str]) -> Image.Image:
    """Table of the numbers of images: a row for each true class, a column for each guess, and the row's accuracy,
    "-" where the class has no images.

    Right answers are blue and wrong ones orange, darker the larger their share of the row. The more classes, the
    smaller the cells: then numbers stand only where they fit, and names at every few rows and columns.

    Args:
        matrix: Images (C, C), rows are true classes, at most `MOST_CLASSES`.
        class_names: Names of the classes, in order.
    """
    classes = len(class_names)
    cell, left, head = min(36, MOST_CLASSES // classes), 86, 84
    side, every = classes * cell, -(-15 // cell)  # a line of text is 15 pixels high
    canvas = Image.new("RGB", (left + side + 50, head + side), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((2, 2), "predicted", GREY, _font(13))
    draw.text((2, head - 18), "true", GREY, _font(13))
    middles = {left + column * cell + cell // 2: class_names[column] for column in range(0, classes, every)}
    for middle, name in (middles | {left + side + 32: "accuracy"}).items():
        text = Image.new("L", (head, 18))
        ImageDraw.Draw(text).text((2, 1), sheet.fitting(name, head - 4), 255, _font(14))
        canvas.paste(Image.new("RGB", (18, head), INK), (middle - 9, 0), text.rotate(90, expand=True))
    shares = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    right = torch.eye(classes, dtype=torch.bool)[..., None]
    colours = torch.where(right, _between(*RIGHT, shares), _between(*WRONG, (shares * 3).clamp(max=1)))
    pixels = colours.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    if cell > 5:  # lines between the cells
        pixels[cell - 1 :: cell] = pixels[:, cell - 1 :: cell] = 255
    canvas.paste(Image.fromarray(pixels.numpy()), (left, head))
    for row in range(0, classes, every):
        middle = head + row * cell + cell // 2
        draw.text((left - 6, middle), sheet.fitting(class_names[row], left - 8), INK, _font(14), anchor="rm")
        accuracy = f"{100 * shares[row, row]:.1f}%" if matrix[row].any() else "-"
        draw.text((left + side + 46, middle), accuracy, INK, _font(13), anchor="rm")
    for row, column in matrix.nonzero().tolist() if every == 1 else ():
        count = str(int(matrix[row, column]))
        if 7 * len(count) < cell:
            ink = PAPER if colours[row, column].sum() < 380 else INK
            place = left + column * cell + cell // 2 - 1, head + row * cell + cell // 2
            draw.text(place, count, ink, _font(13), anchor="mm")
    return canvas


def filters(weight: Tensor) -> Image.Image:
    """The filters of a convolution, at most 12 in a row: grey is zero, each scaled by its own largest weight.

    Args:
        weight: Weights (filters, channels, H, W); three channels show as colours, others by their mean.
    """
    weight = weight.float() if weight.shape[1] in (1, 3) else weight.float().mean(dim=1, keepdim=True)
    largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    tiles = (weight / largest * 127.5 + 127.5).nan_to_num(0.0).round().byte()
    tiles = tiles[:, 0] if tiles.shape[1] == 1 else tiles.permute(0, 2, 3, 1)
    across = min(12, columns(len(tiles)))
    return grid(tiles, across, scale=max(1, 440 // (across * tiles.shape[1])))


def inputs(images: Tensor, captions: Sequence[str]) -> Image.Image:
    """Images as the network sees them, normalised or not, four in a row above their captions.

    Args:
        images: Pixels (N, C, H, W) on any scale; the lowest of all becomes black, the highest white.
        captions: One for each image.
    """
    pixels = images.float() if images.shape[1] == 3 else images.float().mean(dim=1)
    low, high = pixels.min(), pixels.max()
    tiles = ((pixels - low) / (high - low).clamp(min=1e-12) * 255).round().byte()
    return _captioned(tiles, [[Line(caption)] for caption in captions])


def enlarge(tiles: Tensor) -> Tensor:
    """Tiles (..., H, W) uint8 to about 112 pixels: small ones enlarged without smoothing, large ones averaged down."""
    size = tiles.shape[-1]
    if size <= 112:
        scale = -(-112 // size)
        return tiles.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    small = F.interpolate(tiles.reshape(-1, 1, size, size).float(), (112, 112), mode="area").round().byte()
    return small.view(*tiles.shape[:-2], 112, 112)


def mistakes(tiles: Tensor, labels: Sequence[str], guesses: Sequence[str], sure: Sequence[float]) -> Image.Image:
    """Images that the network got wrong, each with its true class, and the guess and its probability.

    Args:
        tiles: Images (N, H, W) or (N, C, H, W) uint8.
        labels: Name of each image's true class.
        guesses: Name of the class it was taken for.
        sure: Probability of that class, 0 to 1.
    """
    if len(tiles) == 0:
        picture = Image.new("RGB", (240, 40), PAPER)
        ImageDraw.Draw(picture).text((8, 12), "no mistakes", INK, _font(15))
        return picture
    captions = [
        [Line(f"is {label}", sheet.TRUE), Line(f"{guess} {probability:.1%}", sheet.WRONG)]
        for label, guess, probability in zip(labels, guesses, sure, strict=True)
    ]
    return _captioned(tiles, captions)


def _captioned(tiles: Tensor, captions: Sequence[Sequence[Line]]) -> Image.Image:
    """Tiles (N, H, W) or (N, C, H, W) uint8, four in a row, each above its lines."""
    large = enlarge(tiles)
    entries = [
        Entry([Image.fromarray(sheet.drawable(tile))], [lines]) for tile, lines in zip(large, captions, strict=True)
    ]
    return sheet.sheet(entries, 4, large.shape[-1])


def _between(low: tuple[int, int, int], high: tuple[int, int, int], shares: Tensor) -> Tensor:
    """Colours (..., 3) uint8."""
    first, last = torch.tensor(low), torch.tensor(high)
    return (first + (last - first) * shares[..., None]).round().byte()


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
