"""LayerCAM drawn over the image that it explains."""

import numpy as np
from PIL import Image
from torch import Tensor

from pictures.sheet import Entry, sheet, square

EDGE = 280  # pixels of each of the two images of an overlay
# From cold to hot, in equal steps.
COLOURS = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], np.float64)


def overlay(image: np.ndarray, cam: Tensor, caption: str) -> Image.Image:
    """The image, and beside it the same image under the heat map.

    Args:
        image: What the network saw, (H, W) or (H, W, 3) uint8.
        cam: Its LayerCAM (h, w), 0 to 1.
        caption: Written above.
    """
    return sheet([Entry((square(image, EDGE), heat_map(image, cam)), title=caption)], 1, EDGE)


def heat_map(image: np.ndarray, cam: Tensor, edge: int = EDGE) -> Image.Image:
    """The image (H, W) or (H, W, 3) uint8, resized to `edge` x `edge` pixels, under its LayerCAM (h, w), 0 to 1."""
    heat = np.asarray(Image.fromarray(cam.numpy()).resize((edge, edge), Image.Resampling.BICUBIC)).clip(0, 1)
    position = heat[..., None] * (len(COLOURS) - 1)
    lower = np.minimum(position.astype(int), len(COLOURS) - 2)
    below, above = COLOURS[lower[..., 0]], COLOURS[lower[..., 0] + 1]
    colours = Image.fromarray((below + (above - below) * (position - lower)).astype(np.uint8))
    return Image.blend(square(image, edge).convert("RGB"), colours, 0.6)
