"""The one way to draw a sheet: pictures in rows, each with a title above and lines of text below."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, GAP, LINE = 16, 10, 22
NUMBERS = 56  # pixels beside the bars
INK, FAINT, BAR, PAPER, FRAME = "#20242a", "#79808a", "#9cc3e6", "#ffffff", "#d9dde2"
TRUE, WRONG = "#08519c", "#d94801"


class Line(NamedTuple):
    """A line of text; with a `share`, 0 to 1, it lies on a bar of that length and ends with the percentage."""

    text: str
    ink: str = INK
    share: float | None = None


class Entry(NamedTuple):
    """One place of the sheet.

    Attributes:
        pictures: Side by side, each centred in a square.
        below: Lines for each picture, or a single list for the whole width.
        title: Written above; its middle is left out if it is too long.
        number: Written faintly before the title.
    """

    pictures: Sequence[Image.Image]
    below: Sequence[Sequence[Line]] = ()
    title: str = ""
    number: str = ""


def sheet(entries: Sequence[Entry], columns: int, edge: int, heading: Sequence[str] = ()) -> Image.Image:
    """The entries, at least one and all of one kind, `columns` in a row.

    Args:
        entries: What is shown.
        columns: Entries in a row.
        edge: Pixels of a picture's square.
        heading: Faint lines above all.
    """
    across, above = max(len(entry.pictures) for entry in entries), any(entry.title for entry in entries)
    lines = max((len(lines) for entry in entries for lines in entry.below), default=0)
    width = across * edge + (across - 1) * GAP
    step = width + 2 * MARGIN, LINE * above + edge + (8 + LINE * lines if lines else 0) + 2 * MARGIN
    columns = min(columns, len(entries))
    head = len(heading) * LINE
    wide = max([columns * step[0], *(round(_font().getlength(line)) + 2 * MARGIN for line in heading)])
    canvas = Image.new("RGB", (wide, head + -(-len(entries) // columns) * step[1]), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(heading):
        draw.text((MARGIN, MARGIN // 2 + number * LINE), line, FAINT, _font())
    for index, entry in enumerate(entries):
        left, top = index % columns * step[0] + MARGIN, head + index // columns * step[1] + MARGIN
        if above:
            indent = round(_font().getlength(entry.number))
            draw.text((left, top + 14), entry.number, FAINT, _font(), "ls")
            draw.text((left + indent, top + 14), fitting(entry.title, width - indent), INK, _font(), "ls")
            top += LINE
        for place, picture in enumerate(entry.pictures):
            x = left + place * (edge + GAP)
            canvas.paste(picture, (x + (edge - picture.width) // 2, top + (edge - picture.height) // 2))
            if picture.size != (edge, edge):
                draw.rectangle((x, top, x + edge - 1, top + edge - 1), outline=FRAME)
        for place, texts in enumerate(entry.below):
            room = width if len(entry.below) == 1 else edge
            for row, text in enumerate(texts):
                _draw_line(draw, text, left + place * (edge + GAP), top + edge + 8 + row * LINE, room)
    return canvas


def square(image: np.ndarray, edge: int) -> Image.Image:
    """An image (H, W) or (H, W, 3) uint8, `edge` pixels wide and high, its own pixels visible."""
    return Image.fromarray(image).resize((edge, edge), Image.Resampling.NEAREST)


def drawable(image: Tensor) -> np.ndarray:
    """An image (H, W), (1, H, W) or (3, H, W) uint8 as Pillow takes it: (H, W) or (H, W, 3)."""
    if image.dim() == 3:
        image = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    return image.contiguous().numpy()


def fitting(text: str, width: int) -> str:
    """The text as it can be drawn, its middle left out if it is wider than `width` pixels."""
    text, font = legible(text), _font()
    if font.getlength(text) <= width:
        return text
    keep = len(text) // 2
    while keep and font.getlength(f"{text[:keep]}…{text[-keep:]}") > width:
        keep -= 1
    return f"{text[:keep]}…{text[-keep:]}" if keep else "…"


def legible(text: str) -> str:
    """The text without what Pillow's own font lacks.

    Such a character is simplified (a full-width letter to a plain one) or else escaped, as "\\u7167": it is never drawn
    as a box.
    """
    shown = ""
    for character in unicodedata.normalize("NFC", text):  # macOS separates accents from letters in file names
        simpler = "".join(part for part in unicodedata.normalize("NFKD", character) if _has(part))
        shown += character if _has(character) else simpler or character.encode("unicode_escape").decode()
    return shown


def _draw_line(draw: ImageDraw.ImageDraw, line: Line, x: int, y: int, width: int) -> None:
    if line.share is None:
        draw.text((x, y), fitting(line.text, width), line.ink, _font())
        return
    draw.rectangle((x, y, x + max(1, round(line.share * (width - NUMBERS))), y + LINE - 5), fill=BAR)
    draw.text((x + 4, y), fitting(line.text, width - NUMBERS), line.ink, _font())
    share = f"{line.share:.1%}"
    draw.text((x + width - _font().getlength(share), y), share, line.ink, _font())


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(14)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as always when a size is given
    return font


@cache
def _has(character: str) -> bool:
    """Whether the font draws anything but its sign for a missing character, which U+FFFF stands for."""
    mask, missing = (_font().getmask(each) for each in (character, "\uffff"))
    return (any(bytes(mask)) or character.isspace()) and (mask.size, bytes(mask)) != (missing.size, bytes(missing))
