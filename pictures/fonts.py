"""Fonts for names in any script: Pillow's own for Latin letters, else one of the system's."""

import os
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import ImageFont

FOLDERS = (
    *("$XDG_DATA_HOME/fonts", "$HOME/.local/share/fonts", "$HOME/.fonts", "/usr/local/share/fonts", "/usr/share/fonts"),
    *("$HOME/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts"),  # macOS
    *("$LOCALAPPDATA/Microsoft/Windows/Fonts", "$WINDIR/Fonts"),
)
FILES = r"(?!lastresort).*\.(ttf|ttc|otf|otc)"  # macOS's "last resort" has a box of its own for every script
# Tried first: plain sans-serif fonts with Chinese, Japanese and Korean characters, then one with many other scripts.
GOOD = r"noto ?sans ?(cjk|sc)|source ?han ?sans|pingfang|hiragino|msyh|wqy|droid ?sans ?fallback|simhei|dejavu ?sans\."
ODD = r"bold|black|heavy|medium|thin|light|italic|oblique|mono|serif|condensed"  # tried last


def legible(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and a font, `size` pixels high, that has all its characters.

    What none of the fonts has is simplified (a full-width letter to a plain one) or else escaped, as "\\u7167": it is
    never drawn as a box.
    """
    text = unicodedata.normalize("NFC", text)  # macOS keeps accents in file names apart from their letters
    wanted = text + "…"  # with which a long name is shortened
    best, most = None, -1
    for path in _fonts():
        covered = sum(_has(path, character) for character in wanted)
        if covered > most:
            best, most = path, covered
        if covered == len(wanted):
            break
    shown = "".join(character if _has(best, character) else _replaced(best, character) for character in text)
    return shown, _font(best, size)


def _fonts() -> Iterator[Path | None]:
    """None for Pillow's own font, then the system's; they are looked for only where that one does not do."""
    yield None
    yield from _system_fonts()


@cache
def _system_fonts() -> list[Path]:
    """Font files of the system that can be read, the likeliest to serve first."""
    found = []
    for folder in FOLDERS:
        for place, _, names in os.walk(os.path.expandvars(folder)):
            found += [Path(place, name) for name in names if re.fullmatch(FILES, name.lower())]

    def rank(path: Path) -> tuple[bool, bool, str]:
        name = path.name.lower()
        return not re.search(GOOD, name), bool(re.search(ODD, name)), name

    return [path for path in sorted(found, key=rank) if _opens(path)]


def _opens(path: Path) -> bool:
    try:
        _font(path, 14).getmask("a")
    except OSError:  # broken, or made of bitmaps of other sizes
        return False
    return True


@cache
def _font(path: Path | None, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as always where a size is given
    return font


@cache
def _has(path: Path | None, character: str) -> bool:
    """Whether the font draws anything but its sign for a missing character, which U+FFFF stands for."""
    size, pixels = _drawn(path, character)
    return (any(pixels) or character.isspace()) and (size, pixels) != _drawn(path, "\uffff")


@cache
def _drawn(path: Path | None, character: str) -> tuple[tuple[int, int], bytes]:
    mask = _font(path, 14).getmask(character)
    return mask.size, bytes(mask)


def _replaced(path: Path | None, character: str) -> str:
    parts = unicodedata.normalize("NFKD", character)
    return "".join(part for part in parts if _has(path, part)) or character.encode("unicode_escape").decode()
