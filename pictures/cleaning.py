"""Turns any picture into an image like those of Fashion-MNIST.

Xiao et al. 2017 (arXiv:1708.07747, section 2) made the data set from photographs on a nearly white background: trim
edges that are within 5 % of the corners' colour, scale the longest edge to 28 pixels by leaving out rows and columns,
sharpen, centre on 28x28, negate, convert to grey. The same is done here, with these differences:

- The background may be noisy, unevenly lit or dark: a surface is fitted to the whole border. It becomes exactly 0, as
  in the data set, and specks do not stop the trimming.
- A picture that is light on dark already is not negated.
- On a background that is patterned, or neither light nor dark, as a bed or a floor is, the garment is cut out by its
  colours (`pictures.segmentation`) and its median becomes a middling grey.
- Lanczos scaling replaces leaving out pixels, which suffers from noise and fine patterns, and sharpening.
- A picture of 28x28 pixels is taken for an image of the data set: it is only made grey and, if needed, negated.

How often real photographs are recognised is measured in benchmarks/README.md.
"""

from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from datamodules.files.decoding import on_ground
from pictures.segmentation import blur, fit_ground, garment_mask

Invert = Literal["auto", "always", "never"]

SIZE = 28
WORKING_EDGE = 400  # pixels; a plain background and the object are told apart at this size
CLOSENESS = 0.05 * 255  # of trimmed pixels to the background
NOISE = 6  # standard deviations of the background's noise that still count as background
PLAIN = 16  # the most noise of a plain background
LIGHT, DARK = 170, 50  # its grey level is above or below
SEGMENTED_EDGE = 96  # pixels of the longer edge of other photographs
MIDDLE, CONTRAST, FAINTEST = 110, 50, 40  # median, largest deviation and least grey level of a cut-out garment
GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in Pillow


def as_fashion_mnist(picture: Image.Image, invert: Invert = "auto") -> np.ndarray:
    """A picture, trimmed, scaled, centred, light on dark.

    Args:
        picture: Of mode RGB or RGBA and any size.
        invert: Whether to negate; "auto" does it unless the background is plain and nearly black.

    Returns:
        Grey values (28, 28) uint8.

    Raises:
        ValueError: If nothing stands out from the background.
    """
    if picture.mode == "RGBA":
        picture = _on_ground(_reduced(picture), invert)
    if picture.size == (SIZE, SIZE):
        grey = np.asarray(picture.convert("L"))
        corners = np.median([grey[0, 0], grey[0, -1], grey[-1, 0], grey[-1, -1]])
        return 255 - grey if invert == "always" or (invert == "auto" and corners > 127) else grey

    pixels = np.asarray(_reduced(picture), np.float64)  # (H, W, 3)
    ground, noise = fit_ground(pixels)
    level = float(np.median(ground @ GREY))
    if noise > PLAIN or DARK < level < LIGHT:
        return _cut_out(picture, invert)
    stands_out = np.abs(pixels - ground).max(axis=2) > max(CLOSENESS, NOISE * noise)
    if min(stands_out.shape) >= SIZE:
        stands_out = np.asarray(Image.fromarray(stands_out).convert("L").filter(ImageFilter.MedianFilter(5))) > 0
    if not stands_out.any():
        return _cut_out(picture, invert)
    grey, ground = pixels @ GREY, ground @ GREY
    if invert == "always" or (invert == "auto" and level >= LIGHT):
        grey, ground = 255 - grey, 255 - ground
    levels = (grey - ground) * 255 / np.maximum(255 - ground, 1)
    return _centred(levels.clip(0, 255), stands_out)


def _cut_out(picture: Image.Image, invert: Invert) -> np.ndarray:
    """The garment alone, of a middling grey whatever its colour, for it may be as light as its ground."""
    scale = SEGMENTED_EDGE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    pixels = np.asarray(picture.resize(size, Image.Resampling.BOX), np.float64)
    rest = pixels - fit_ground(pixels)[0]
    if np.abs(rest).max() <= CLOSENESS:
        raise ValueError("shows nothing that stands out from its background")
    mask = garment_mask(rest)
    near = blur(mask)
    inner = near > 0.99 * near.max()
    grey = pixels @ GREY * (1 if invert == "never" else -1)
    levels = MIDDLE + (grey - np.median(grey[inner])) * min(1, CONTRAST / max(grey[inner].std(), 1))
    return _centred(levels.clip(FAINTEST, 255) * ((near - 0.3) / 0.5).clip(0, 1), mask)


def _reduced(picture: Image.Image) -> Image.Image:
    return picture.reduce(max(1, round(max(picture.size) / WORKING_EDGE)))


def _on_ground(picture: Image.Image, invert: Invert) -> Image.Image:
    """Without transparency: on white, like the photographs of the data set, or on black if the object is light."""
    red, green, blue, alpha = np.moveaxis(np.asarray(picture, np.float64), 2, 0)
    brightness = np.average(np.stack([red, green, blue], axis=2) @ GREY, weights=alpha) if alpha.any() else 0.0
    black = invert == "never" or (invert == "auto" and brightness > 0.75 * 255)
    return on_ground(picture, "black" if black else "white")


def _centred(values: np.ndarray, object_: np.ndarray) -> np.ndarray:
    """Trimmed to the object, longest edge 28; the larger part of an odd margin is left and on top, as in the set."""
    rows, columns = np.flatnonzero(object_.any(axis=1)), np.flatnonzero(object_.any(axis=0))
    values = values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = values.shape
    scale = SIZE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.LANCZOS))
    top, left = (SIZE - size[1] + 1) // 2, (SIZE - size[0] + 1) // 2
    image = np.zeros((SIZE, SIZE), np.uint8)
    image[top : top + size[1], left : left + size[0]] = small.clip(0, 255).round()
    return image
