"""One PNG that shows each picture, what the network saw of it, and its three likeliest classes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from datamodules.files.decoding import on_ground
from pictures.sheet import WRONG, Entry, Line, sheet, square

COLUMNS = 3
EDGE = 140  # pixels of a thumbnail, and of the network's view: 28 x 5
TRANSPARENT = "#b9c0c8"


class Tile(NamedTuple):
    """One picture of the sheet.

    Attributes:
        name: Written above it.
        thumbnail: The picture itself, at most EDGE x EDGE.
        image: What the network sees, (28, 28) uint8.
        top: The likeliest classes and their probabilities.
        note: A line below them, in another colour; empty for none.
    """

    name: str
    thumbnail: Image.Image
    image: np.ndarray
    top: Sequence[tuple[str, float]]
    note: str = ""


def contact_sheet(tiles: Sequence[Tile], first: int = 1) -> Image.Image:
    """The tiles in rows of three, numbered from `first` on as in the table."""
    entries = [
        Entry(
            pictures=(tile.thumbnail, square(tile.image, EDGE)),
            below=[
                [
                    *(Line(name, share=probability) for name, probability in tile.top),
                    *([Line(tile.note, WRONG)] if tile.note else []),
                ]
            ],
            title=tile.name,
            number=f"{number}  ",
        )
        for number, tile in enumerate(tiles, start=first)
    ]
    return sheet(entries, COLUMNS, EDGE)


def thumbnail(picture: Image.Image) -> Image.Image:
    """A copy of a picture of mode RGB or RGBA, at most EDGE x EDGE, with grey where it is transparent."""
    small = on_ground(picture, TRANSPARENT)
    scale = EDGE / max(small.size)
    size = max(1, round(small.width * scale)), max(1, round(small.height * scale))
    return small.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)
