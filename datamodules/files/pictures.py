"""Reading picture files of any kind, without trusting them."""

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

# Pillow knows more formats, but some of them run other programs (EPS starts Ghostscript) and few are for photographs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
# Reported when found in a folder, since one would expect them to be read.
UNREADABLE_SUFFIXES = {".heic", ".heif", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw", ".jxl", ".jp2"}
UNREADABLE_SUFFIXES |= {".avif", ".webp"}  # of a Pillow that was built without them
# Folders of thumbnails and deleted files.
OF_SYSTEMS = {"@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"}
# What runs, `predict`, compare.py and sweep.py leave: how their folders' names begin, and what lies in them.
OUTPUTS = {"version_": ("config.yaml",), "predict_": ("pictures.png", "mistakes.png", "gradcam")}
OUTPUTS |= {"comparison": ("report.md", "*/report.md"), "sweeps": ("*/.lock", "*/study.db")}
# Of fractions, and of 8, 10, 12, 14 and 16 bits.
WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)
LONGEST_EDGE = 1024  # pixels; larger JPEGs are decoded at a reduced size unless another edge is asked for


# About odd metadata. Once and for all: pictures are read by threads, which share Python's filters.
warnings.filterwarnings("ignore", module=r"PIL\.")


class PictureError(Exception):
    """A file that is not read; the message says why, and follows the file's name."""


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths`, and the picture files in the folders among them, sub-folders included."""
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        found += pictures_below(path)
    return found


def pictures_below(folder: Path) -> Iterator[Path]:
    """The picture files in a folder and in those within it, each folder once, wherever links lead; none hidden.

    Raises:
        PermissionError: If a folder can't be read.
    """
    seen = set(map(str, Path(os.path.realpath(folder)).parents))  # a link to one of them would lead to other classes
    for place, inside, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not is_hidden(name) and not _is_output(Path(place, name)))
        yield from (Path(place, name) for name in sorted(names) if not is_hidden(name) and is_picture_name(name))


def _refuse(error: OSError) -> None:
    if isinstance(error, PermissionError):  # else it has just been removed
        raise error


def _is_output(folder: Path) -> bool:
    """Whether a program made a folder: its curves, sheets and heat maps are no pictures of anything."""
    inside = next((names for start, names in OUTPUTS.items() if folder.name.startswith(start)), ())
    return any(path for name in inside for path in folder.glob(name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems and archives leave between pictures."""
    return name.startswith(".") or name in OF_SYSTEMS


def is_picture_name(name: str) -> bool:
    """Whether one would expect a file of that name to be read as a picture."""
    return Path(name).suffix.lower() in _suffixes()


@cache
def _suffixes() -> set[str]:
    Image.init()
    return {suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS} | UNREADABLE_SUFFIXES


def read_picture(path: Path, edge: int = LONGEST_EDGE) -> Image.Image:
    """The first frame of a file, upright, in mode RGB or RGBA; large JPEGs reduced to at least `edge` pixels an edge.

    Raises:
        PictureError: If the file can't be read as a picture.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        if not path.exists():
            raise PictureError("does not exist")
        if not path.is_file():
            raise PictureError("is not a file")
        with Image.open(path, formats=formats) as file:
            if file.width * file.height > (Image.MAX_IMAGE_PIXELS or math.inf):  # at twice as many Pillow raises
                raise Image.DecompressionBombError
            file.draft(None, (edge, edge))  # JPEG files are decoded at a fraction of their size
            deep = any(";16" in str(tile[3]) for tile in file.tile)
            file.load()
            return _upright(_eight_bits(file, path, deep))
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except Image.UnidentifiedImageError:
        readable = ", ".join(formats)
        raise PictureError(f"is not a picture that can be read ({readable}); save it as JPEG or PNG") from None
    except MemoryError:
        raise PictureError("does not fit in memory; make it smaller") from None
    except OSError as error:
        raise PictureError(f"can't be read: {error.strerror or error}") from None
    except Exception as error:  # decoders raise anything for a broken file
        raise PictureError(f"is broken: {error or type(error).__name__}") from None


def _eight_bits(picture: Image.Image, path: Path, deep: bool) -> Image.Image:
    """Mode RGB, or RGBA where anything is transparent; deeper greys and colours are scaled, not clipped."""
    if picture.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(picture, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        eight_bits = Image.fromarray(_scaled(values)).convert("RGB")
    elif deep and picture.format == "PNG":
        from torchvision.io import ImageReadMode, decode_png  # Pillow would drop half of the bits

        content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)  # whatever its name is
        values = decode_png(content, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
        colours = values.shape[2] - (values.shape[2] in (2, 4))
        bands = [
            _scaled(values[..., :colours]),
            *([_scaled(values[..., colours:])] if colours < values.shape[2] else []),
        ]
        eight_bits = Image.fromarray(np.concatenate(bands, axis=2)).convert("RGBA" if len(bands) > 1 else "RGB")
    elif deep:  # what Pillow has kept are the upper eight of the sixteen bits, few of which may be in use
        extrema: Any = picture.getextrema()
        largest = max(high for _, high in extrema[:3])
        bits = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        return bits.point(lambda value: min(255, round(value * 65535 / _white(largest * 256.0 + 255))))
    else:
        return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    eight_bits.info |= picture.info
    return eight_bits


def _scaled(values: np.ndarray) -> np.ndarray:
    """Numbers of any depth as uint8."""
    largest = float(values.max(initial=0))
    # Eight bits as sixteen; a smaller largest number would be a picture that is nearly black.
    stretched = largest > 4095 and any((values % step == 0).all() for step in (256, 257))
    white = 65535.0 if stretched else _white(largest)
    return (values.astype(np.float64) / max(white, largest) * 255).clip(0, 255).round().astype(np.uint8)


def _white(largest: float) -> float:
    """What white is where the largest number is this: no file says how many of its bits are in use."""
    return next((white for white in WHITES if largest <= white), WHITES[-1])


def _upright(picture: Image.Image) -> Image.Image:
    """The picture, rotated as its EXIF data says, if that can be read."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # the pixels are fine, whatever a camera has written beside them
        return picture
