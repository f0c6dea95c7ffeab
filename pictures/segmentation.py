"""Tells the garment of a photograph from the ground that it lies on, by the colours of the border and of the middle."""

import numpy as np
from PIL import Image

COLOURS = 32  # of the palette in which garment and ground are compared
ROUNDS = 6
FITS = 8  # of the surface, each with less weight on what stuck out of the one before


def fit_ground(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit a quadratic surface to the whole border, so that uneven light counts as ground.

    Least squares with Cauchy weights: garments that reach the border hardly move it.

    Args:
        pixels: (H, W, 3), 0 to 255.

    Returns:
        The colour of the ground at each pixel (H, W, 3), and the standard deviation of its noise and pattern.
    """
    height, width, _ = pixels.shape
    edge = max(1, min(height, width) // 20)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=2)
    border = np.ones((height, width), bool)
    border[edge:-edge, edge:-edge] = False
    known, colours = terms[border], pixels[border]
    weights, deviation = np.ones(len(known)), 0.0
    for _ in range(FITS):
        weighted = known * weights[:, None]
        factors = np.linalg.lstsq(weighted.T @ known, weighted.T @ colours, rcond=None)[0]
        away = np.abs(colours - known @ factors).max(axis=1)
        deviation = 1.5 * float(np.median(away))  # of normal noise, and outliers do not count
        weights = 1 / (1 + (away / max(2.0, deviation)) ** 2)
    return terms @ factors, deviation


def garment_mask(rest: np.ndarray) -> np.ndarray:
    """Which pixels show the garment, as one piece without holes.

    A palette of the picture's own colours is divided between garment and ground: each pixel's share of the garment
    follows from how often its colour occurs in either, and from its place, as the middle is more likely garment than
    the border; the shares then say anew how often (expectation maximisation, as in GrabCut but without its graph).

    Args:
        rest: What remains of the colours without the ground's, (H, W, 3); about 100 pixels high or wide are enough.

    Returns:
        (H, W) bool; never empty.
    """
    height, width, _ = rest.shape
    shown = Image.fromarray((rest * 0.6 + 128).clip(0, 255).astype(np.uint8))
    colour = np.asarray(shown.quantize(COLOURS, kmeans=2))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    prior = (0.95 * (1 - np.maximum(abs(x), abs(y)) ** 4)).clip(0.02, 0.8)
    share = prior
    for _ in range(ROUNDS):
        often = [np.bincount(colour.ravel(), part.ravel()) + 0.5 for part in (share, 1 - share)]
        evidence = np.log(often[0] / often[0].sum()) - np.log(often[1] / often[1].sum())
        logit = np.log(prior / (1 - prior)) + 2 * blur(evidence[colour])
        share = blur(blur(sharp := 1 / (1 + np.exp(-logit.clip(-12, 12)))))
    mask = blur(sharp) > 0.5
    return _one_piece(mask if mask.mean() > 0.02 else share >= np.quantile(share, 0.7))


def blur(values: np.ndarray) -> np.ndarray:
    """The mean of each value (H, W) and its eight neighbours."""
    padded = np.pad(values.astype(np.float64), 1, "edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def _one_piece(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask, its holes filled."""
    left, largest = mask, np.zeros_like(mask)
    while left.sum() > largest.sum():
        start = np.zeros_like(mask)
        start.flat[np.flatnonzero(left)[0]] = True
        part = _connected(start, left)
        left = left & ~part
        largest = max(part, largest, key=np.sum)
    outside = np.pad(~largest, 1, constant_values=True)
    corner = np.zeros_like(outside)
    corner[0, 0] = True
    return ~_connected(corner, outside)[1:-1, 1:-1]


def _connected(part: np.ndarray, within: np.ndarray) -> np.ndarray:
    """What of `within` is connected with `part`, across edges of pixels."""
    while True:
        padded = np.pad(part, 1)
        grown = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        grown &= within
        if np.array_equal(grown, part):
            return part
        part = grown
