"""Feature maps side by side, as one picture."""

from functools import lru_cache

import numpy as np
from PIL import Image
from torch import Tensor

GAP = 2  # pixels between the maps
# Eight colours of viridis (https://bids.github.io/colormap), which is even in lightness; the rest is interpolated.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (70, 50, 127),
        (54, 92, 141),
        (39, 127, 142),
        (31, 161, 135),
        (74, 194, 109),
        (159, 218, 58),
        (253, 231, 37),
    ]
)


def grid(tiles: Tensor, columns: int, scale: int = 1, background: int = 255) -> Image.Image:
    """Tiles side by side, `GAP` pixels between them.

    Args:
        tiles: Grey values (N, H, W) uint8, or colours (N, H, W, 3) uint8.
        columns: Tiles in a row.
        scale: Each pixel becomes a square of this many.
        background: Grey value between the tiles.
    """
    count, height, width = tiles.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    down, right = height * scale + GAP, width * scale + GAP
    canvas = np.full((rows * down - GAP, columns * right - GAP, *tiles.shape[3:]), background, dtype=np.uint8)
    enlarged = tiles.numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    for index, tile in enumerate(enlarged):
        top, left = index // columns * down, index % columns * right
        canvas[top : top + height * scale, left : left + width * scale] = tile
    return Image.fromarray(canvas)


def feature_maps(maps: Tensor, most: int = 64) -> Image.Image:
    """Feature maps side by side, dark blue at each map's lowest value and yellow at its highest.

    Args:
        maps: Activations (C, H, W).
        most: Only the first `most` maps are drawn.
    """
    maps = maps[:most].float()
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    levels = ((maps - low) / (high - low).clamp(min=1e-12) * 254).nan_to_num(0.0).round().byte()
    across = columns(len(levels))
    picture = grid(levels, across, scale=max(1, 440 // (across * levels.shape[-1])))
    picture.putpalette(_palette())
    return picture


def columns(count: int) -> int:
    """The number of columns, a power of two, that makes a grid of `count` tiles about square."""
    return 1 << max(0, (count - 1).bit_length() + 1) // 2


@lru_cache
def _palette() -> bytes:
    """Viridis at the levels 0 to 254; 255, the gap between the maps, is white."""
    levels = np.linspace(0, len(_VIRIDIS) - 1, 255)
    colours = np.stack([np.interp(levels, np.arange(len(_VIRIDIS)), channel) for channel in _VIRIDIS.T], axis=1)
    return np.concatenate([colours.round(), [[255, 255, 255]]]).astype(np.uint8).tobytes()
