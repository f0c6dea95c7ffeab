"""Fashion-MNIST's garments as they come out of photographs; whole batches, on the device.

The background of Fashion-MNIST's images is known to be 0, so that a garment can be laid on any other ground. What
`pictures.cleaning` leaves of a photograph differs from those images in more: shoes come in pairs and point anywhere,
garments lie askew, in other tones and under uneven light, and are cut out not quite along their edges, or not at all.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SHOES = (5, 7, 9)  # Fashion-MNIST's labels of what comes in pairs
WHOLE = 0.06  # share of the pictures whose ground stays


def photographed(images: Tensor, labels: Tensor, share: float) -> Tensor:
    """Make garments out of photographs of a share of uint8 images (N, 1, H, W), light on black, labels (N,).

    Those are the first of the batch, which is in random order.
    """
    count = round(share * len(images))
    if not count:
        return images
    garments = images[:count].float() / 255
    garments = _laid(torch.cat([garments, _opacity(garments)], dim=1), labels[:count])
    tones, opacity = garments[:, :1], garments[:, 1:].clamp(0, 1)
    pixels = _lit(_toned(tones, opacity) + (1 - opacity) * _grounds(tones))
    pixels = torch.where(_draw(pixels, 0, 1) < WHOLE, pixels, pixels * _cut(opacity))
    blurred = F.avg_pool2d(F.pad(pixels, (1,) * 4, mode="replicate"), 3, 1)
    pixels = pixels + _draw(pixels, -0.7, 0.5) * (blurred - pixels)  # sharpened as often as blurred
    pixels = pixels + _draw(pixels, 0, 0.03) * torch.randn_like(pixels) * (pixels > 0.02)
    return torch.cat([pixels.clamp(0, 1).mul(255).round().byte(), images[count:]])


def _draw(images: Tensor, low: float, high: float) -> Tensor:
    """A number for each image, (N, 1, 1, 1)."""
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def _noise(images: Tensor, cells: int, mode: str = "bicubic") -> Tensor:
    """Random values on a grid of so many cells, enlarged to the images' size."""
    values = torch.randn(len(images), 1, cells, cells, device=images.device)
    return F.interpolate(values, images.shape[-2:], mode=mode)


def _slope(images: Tensor) -> Tensor:
    """A plane through each image that rises in a random direction, from about -1 to 1."""
    y, x = (torch.linspace(-1, 1, size, device=images.device) for size in images.shape[-2:])
    angle = _draw(images, 0, 2 * math.pi)
    return x * angle.cos() + y[:, None] * angle.sin()


def _opacity(garments: Tensor) -> Tensor:
    """1 inside a garment, holes between its parts included where it surrounds them, and soft along its edge."""
    solid = (garments > 0.03).int()  # no floats, whose sums on a GPU depend on their order
    sides = [solid.cumsum(axis) * solid.flip(axis).cumsum(axis).flip(axis) for axis in (2, 3)]
    inside = (sides[0] * sides[1]).clamp(max=1).float()
    core = -F.max_pool2d(F.pad(-inside, (1,) * 4), 3, 1)
    edge = (garments / F.max_pool2d(garments, 3, 1, 1).clamp(min=1e-3)).clamp(0, 1)
    return torch.where(core > 0, core, inside * edge)


def _moved(layers: Tensor, theta: list[Tensor]) -> Tensor:
    """Sample images (N, C, H, W) at the places that a matrix of two rows, each of its values (N, 1, 1, 1), gives."""
    grid = F.affine_grid(torch.stack(theta, dim=1).view(-1, 2, 3), list(layers.shape), align_corners=False)
    return F.grid_sample(layers, grid, align_corners=False)


def _laid(layers: Tensor, labels: Tensor) -> Tensor:
    """Tones and opacity (N, 2, H, W) turned, stretched and scaled to the frame; most shoes at any angle, in pairs."""
    shoe = torch.isin(labels, torch.tensor(SHOES).to(labels.device, non_blocking=labels.is_cuda)).view(-1, 1, 1, 1)
    turn = torch.where(shoe & (_draw(layers, 0, 1) < 0.6), _draw(layers, -180, 180), _draw(layers, -12, 12))
    turn, aspect, shear = turn * math.pi / 180, _draw(layers, -0.25, 0.25).exp(), _draw(layers, -0.1, 0.1)
    wide, high = (torch.where(shoe, 1.45, 1.15) * factor for factor in (aspect, 1 / aspect))
    pair = shoe & (_draw(layers, 0, 1) < 0.7)
    apart = torch.where(pair, _draw(layers, 0.3, 0.6), 0.0)

    def placed(layers: Tensor, turn: Tensor, down: Tensor) -> Tensor:
        cosine, sine = turn.cos(), turn.sin()
        return _moved(layers, [wide * cosine, shear - wide * sine, 0 * turn, high * sine, high * cosine, down])

    mirrored = torch.where(_draw(layers, 0, 1) < 0.5, layers.flip(2), layers)
    one, other = placed(layers, turn, apart), placed(mirrored, turn + _draw(layers, -0.3, 0.3), -apart)
    together = torch.where(pair, one + other * (1 - one[:, 1:]), one)
    margin = torch.where(_draw(layers, 0, 1) < 0.7, _draw(layers, 0.97, 1.06), _draw(layers, 0.9, 1.4))
    return _framed(together, margin)


def _framed(layers: Tensor, margin: Tensor) -> Tensor:
    """Scale what is opaque, in its longer direction, to the frame's size over `margin` (N, 1, 1, 1)."""
    size, opaque = layers.shape[-1], layers[:, 1] > 0.5
    places = torch.linspace(1 / size - 1, 1 - 1 / size, size, device=layers.device)
    spans = []
    for axis in (1, 2):
        first, last = (torch.where(opaque.any(axis), places, end) for end in (1.0, -1.0))
        spans.append((first.amin(1).view(-1, 1, 1, 1) - 1 / size, last.amax(1).view(-1, 1, 1, 1) + 1 / size))
    (left, right), (top, bottom) = spans
    half = torch.maximum(right - left, bottom - top) / 2 * margin
    nothing = torch.zeros_like(half)
    return _moved(layers, [half, nothing, (left + right) / 2, nothing, half, (top + bottom) / 2])


def _toned(tones: Tensor, opacity: Tensor) -> Tensor:
    """The garment in another tone, its contrast changed and at times inverted, with folds of its own."""
    mean = tones.sum((1, 2, 3), keepdim=True) / opacity.sum((1, 2, 3), keepdim=True).clamp(min=1)
    contrast = _draw(tones, 0.2, 1.4) * torch.where(_draw(tones, 0, 1) < 0.4, -1.0, 1.0)
    folds = _draw(tones, 0, 0.1) * _noise(tones, 4) + _draw(tones, 0, 0.06) * _noise(tones, 9)
    return contrast * (tones - mean * opacity) + (_draw(tones, 0.38, 0.68) + folds) * opacity


def _grounds(images: Tensor) -> Tensor:
    """Floors, beds and walls (N, 1, H, W): a tone, a slope, blotches; some have stripes, a coarse grain or an edge."""

    def some(share: float, low: float, high: float) -> Tensor:
        return _draw(images, low, high) * (_draw(images, 0, 1) < share)

    ground = _draw(images, 0, 1) + _draw(images, 0, 0.25) * _slope(images)
    ground = ground + _draw(images, 0, 0.12) * _noise(images, 3) + some(0.6, 0, 0.1) * _noise(images, 7)
    wave = (_slope(images) * _draw(images, 3, 20) + _draw(images, 0, 2 * math.pi)).sin()
    stripes = torch.where(_draw(images, 0, 1) < 0.5, wave, -2.0 * (wave.abs() > 0.95))
    ground = ground + some(0.35, 0, 0.15) * stripes + some(0.15, 0, 0.2) * _noise(images, 14, "nearest")
    beyond = ((_slope(images) - _draw(images, 0.5, 1.2)) * 25).sigmoid()
    return (ground + some(0.4, -0.5, 0.5) * beyond).clamp(0, 1)


def _lit(pixels: Tensor) -> Tensor:
    """Light that falls in from a side."""
    y, x = (torch.linspace(-1, 1, size, device=pixels.device) for size in pixels.shape[-2:])
    return pixels.clamp(0, 1) * (1 + _draw(pixels, -0.2, 0.2) * x + _draw(pixels, -0.2, 0.2) * y[:, None])


def _cut(opacity: Tensor) -> Tensor:
    """1 where the cut keeps the picture: along a line that is not quite the garment's."""
    wide = F.avg_pool2d(F.pad(opacity, (1,) * 4), 3, 1)
    astray = 0.7 * _draw(opacity, 0, 1).square() * (0.3 * _noise(opacity, 6) + 0.2 * _noise(opacity, 3))
    return ((wide - _draw(opacity, 0.15, 0.6) + astray) * _draw(opacity, 8, 30)).sigmoid()
