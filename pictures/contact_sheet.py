"""One PNG that shows each picture, what the network saw of it, and its three likeliest classes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pictures.fonts import legible

COLUMNS = 3
EDGE = 140  # pixels of a thumbnail, and of the network's view: 28 x 5
MARGIN, GAP, LINE = 16, 10, 22
TILE = 2 * EDGE + GAP, LINE + EDGE + 8 + 3 * LINE
NUMBERS = 56  # pixels beside the bars
BASELINE = 14  # of a tile's name, below its top
INK, FAINT, BAR, PAPER, TRANSPARENT = "#20242a", "#79808a", "#9cc3e6", "#ffffff", "#b9c0c8"


class Tile(NamedTuple):
    """One picture of the sheet.

    Attributes:
        name: Written above it.
        thumbnail: The picture itself, at most EDGE x EDGE.
        image: What the network sees, (28, 28) uint8.
        top: The likeliest classes and their probabilities.
    """

    name: str
    thumbnail: Image.Image
    image: np.ndarray
    top: Sequence[tuple[str, float]]


def contact_sheet(tiles: Sequence[Tile]) -> Image.Image:
    """The tiles in rows of three, numbered from 1 as in the table."""
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    step = TILE[0] + 2 * MARGIN, TILE[1] + 2 * MARGIN
    sheet = Image.new("RGB", (columns * step[0], rows * step[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        left, top = index % columns * step[0] + MARGIN, index // columns * step[1] + MARGIN
        _draw_tile(sheet, draw, tile, f"{index + 1}  ", left, top)
    return sheet


def thumbnail(picture: Image.Image) -> Image.Image:
    """A copy of a picture of mode RGB or RGBA, at most EDGE x EDGE, on grey where it is transparent."""
    small = picture.copy()
    if small.mode == "RGBA":
        ground = Image.new("RGBA", small.size, TRANSPARENT)
        ground.alpha_composite(small)
        small = ground.convert("RGB")
    scale = EDGE / max(small.size)
    size = max(1, round(small.width * scale)), max(1, round(small.height * scale))
    return small.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)


def fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, its middle left out if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    keep = len(text) // 2
    while keep and font.getlength(f"{text[:keep]}…{text[-keep:]}") > width:
        keep -= 1
    return f"{text[:keep]}…{text[-keep:]}" if keep else "…"


def _draw_tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, number: str, left: int, top: int) -> None:
    font = ImageFont.load_default(14)
    indent = round(font.getlength(number))
    draw.text((left, top + BASELINE), number, FAINT, font, "ls")
    name, its_font = legible(tile.name, 14)
    draw.text((left + indent, top + BASELINE), fitting(name, its_font, TILE[0] - indent), INK, its_font, "ls")
    y = top + LINE
    box = tile.thumbnail.size
    sheet.paste(tile.thumbnail, (left + (EDGE - box[0]) // 2, y + (EDGE - box[1]) // 2))
    draw.rectangle((left, y, left + EDGE - 1, y + EDGE - 1), outline="#d9dde2")
    seen = Image.fromarray(tile.image).resize((EDGE, EDGE), Image.Resampling.NEAREST)
    sheet.paste(seen, (left + EDGE + GAP, y))
    y += EDGE + 8
    for name, probability in tile.top:
        draw.rectangle((left, y, left + max(1, round(probability * (TILE[0] - NUMBERS))), y + LINE - 5), fill=BAR)
        draw.text((left + 4, y), name, INK, font)
        share = f"{probability:.1%}"
        draw.text((left + TILE[0] - font.getlength(share), y), share, INK, font)
        y += LINE
