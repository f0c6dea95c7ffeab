"""The four files of Fashion-MNIST: found, fetched if missing, verified and parsed.

The data set: https://github.com/zalandoresearch/fashion-mnist (Xiao et al. 2017, arXiv:1708.07747). The IDX format,
a big-endian header and plain bytes, is described at http://yann.lecun.com/exdb/mnist/ (see the Internet Archive).
"""

import errno
import hashlib
import itertools
import logging
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from torch import Tensor

from datamodules.files.download import MIRRORS, TIMEOUT, fetch
from errors import WITHOUT_LOCKS, UserError, expanded, written_aside

# Data set -> name of the uncompressed file -> its length in bytes and the SHA-256 of its content.
KNOWN = {
    "full": {
        "train-images-idx3-ubyte": (47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        "train-labels-idx1-ubyte": (60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
        "t10k-images-idx3-ubyte": (7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        "t10k-labels-idx1-ubyte": (10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    },
    "sample": {  # tests/data
        "train-images-idx3-ubyte": (1_176_016, "1fd0769cad235f8cfb0c3ed6f7e52fd005c4c50088f9dc43d52051ca70ecc672"),
        "train-labels-idx1-ubyte": (1_508, "3317de950899d958f766f29ecbead3f0364f40cd4fd0659d2ae0244c4fa5d0a2"),
        "t10k-images-idx3-ubyte": (392_016, "8fdf02ada67d92f4db5ba3c2f6c5b1cc6186ba6e0efd4914661e4389e103b81e"),
        "t10k-labels-idx1-ubyte": (508, "9c71808b3a0ebfc091442c0009a7aa35be2d9622bf6aaf6891ce9a0088e96c07"),
    },
}
NAMES = tuple(KNOWN["full"])
HOMEPAGE = "https://github.com/zalandoresearch/fashion-mnist"
SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package
DEBIAN_PACKAGE = "dataset-fashion-mnist"
LOCK_TIMEOUT = 3600.0  # seconds; more than another process can need to fetch the files
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
log = logging.getLogger(__name__)


class DatasetError(UserError):
    """The data set is not available; the message is shown to the user as it is."""


def prepare(
    data_dir: Path,
    *,
    data_set: Literal["full", "sample"] = "full",
    system_dir: Path = SYSTEM_DIR,
    mirrors: Sequence[str] = MIRRORS,
    timeout: float = TIMEOUT,
) -> Path:
    """Makes sure that the four files can be read somewhere, and returns the folder that holds them, verified.

    The order: `data_dir`, `data_dir/FashionMNIST/raw` (torchvision's place), `system_dir`, the mirrors. Wrong
    files in `data_dir` are renamed, never deleted. Nothing is written unless necessary. Several processes may
    prepare one folder at once.

    Args:
        data_dir: Folder of the files, each raw or .gz; it need not exist. It may hold the sample of tests/data instead.
        data_set: Which one to look for outside `data_dir`.
        system_dir: Folder that the system's package manager fills.
        mirrors: Addresses to which a file's name is appended.
        timeout: Seconds without progress after which a mirror is given up.

    Raises:
        DatasetError: Nothing worked, or `data_dir` mixes data sets or holds another, or it can't be read or written.
    """
    data_dir = Path(expanded(str(data_dir)))
    good = _survey_and_set_aside(data_dir)
    if data_dir.exists() and not data_dir.is_dir():
        raise DatasetError(f"{data_dir} is a file, but a folder is expected: choose another data_dir")
    kinds = set(good.values())
    if len(good) == len(NAMES) and len(kinds) == 1:
        return data_dir
    if kinds - {data_set}:
        listing = ", ".join(f"{name} ({kind})" for name, kind in good.items())
        raise DatasetError(
            f"{data_dir} has to hold the {len(NAMES)} files of one data set, but holds {listing}: "
            f"complete it or choose another data_dir"
        )

    held = f"{data_dir} holds {len(good)} of its {len(NAMES)} files"
    for folder in (data_dir / "FashionMNIST" / "raw", system_dir):
        try:
            good, bad = _survey(folder)
        except OSError as error:
            good, bad = {}, {folder: f"cannot be read ({error.strerror})"}
        if list(good.values()) == [data_set] * len(NAMES):
            return folder
        for path, problem in bad.items():
            log.warning("%s %s: this folder is not used", path, problem)
        held += f", {folder} {len(good)}"

    def accept(gz_name: str, data: bytes) -> None:
        _install(data_dir, gz_name.removesuffix(".gz"), data, data_set)

    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with _lock(data_dir):
            good, _ = _survey(data_dir)  # another process may have been here
            missing = {f"{name}.gz": _most_bytes(name) for name in NAMES if name not in good}
            failed = fetch(missing, accept, mirrors=mirrors, timeout=timeout)
    except OSError as error:
        raise DatasetError(
            f"Fashion-MNIST cannot be stored in {data_dir} ({error.strerror or error}): "
            f"make it writable, with 31 MB free, or choose another data_dir"
        ) from error
    if failed:
        raise DatasetError(  # each mirror's fault has been told as a warning
            f"Fashion-MNIST was not found and could not be fetched ({held}): get online (behind a proxy: set "
            f"http_proxy and https_proxy); or copy its four .gz files from another machine, or from {HOMEPAGE}, "
            f"into {data_dir}; or, on Debian and its relatives, sudo apt install {DEBIAN_PACKAGE}"
        )
    return data_dir


def whole_below(data_dir: Path) -> Path | None:
    """The folder among `data_dir` and torchvision's below it that holds all four files complete; nothing is changed."""
    for folder in (data_dir, data_dir / "FashionMNIST" / "raw"):
        try:
            folder = Path(expanded(str(folder)))
            files = [path for name in NAMES for path in (folder / name, folder / f"{name}.gz") if path.exists()]
            if all(path.is_file() for path in files) and len(good := _survey(folder)[0]) == len(NAMES):
                return folder if len(set(good.values())) == 1 else None
        except (OSError, ValueError, UserError):
            continue
    return None


def load(folder: Path, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Reads one split out of a folder that `prepare` returned, verifying it again.

    Returns:
        images (N, 28, 28) uint8 and labels (N,) int64 in 0..9.

    Raises:
        DatasetError: A file is missing, wrong or unreadable.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    values, data_sets = [], set()
    for name, shape in ((f"{prefix}-images-idx3-ubyte", (28, 28)), (f"{prefix}-labels-idx1-ubyte", ())):
        bad: dict[Path, str] = {}
        try:
            found = _find(Path(folder), name, bad)
        except OSError as error:
            raise DatasetError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
        if found is None:
            problems = "; ".join(f"{path} {problem}" for path, problem in bad.items())
            raise DatasetError(problems or f"{folder} holds neither {name} nor {name}.gz")
        values.append(_parse_idx(found[0], shape))
        data_sets.add(found[1])
    if len(data_sets) > 1:
        raise DatasetError(f"{folder} mixes images and labels of different data sets")
    images, labels = values
    return images, labels.long()


def _parse_idx(content: bytes, shape: tuple[int, ...]) -> Tensor:
    """Images (N, 28, 28) or labels (N,), uint8; `shape` is one item's. Raises ValueError if the format is wrong."""
    dims = 1 + len(shape)
    header = 4 + 4 * dims
    if content[:4] != bytes((0, 0, 0x08, dims)) or len(content) < header:
        raise ValueError(f"not an IDX file of bytes in {dims} dimensions")
    sizes = struct.unpack_from(f">{dims}I", content, offset=4)
    if sizes[1:] != shape or not sizes[0] or math.prod(sizes) != len(content) - header:
        raise ValueError(
            f"the header says {sizes}, expected (N, {shape}) and N > 0; {len(content) - header:,} bytes follow"
        )
    # A bytearray, because PyTorch warns of memory that it must not write to.
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(sizes)
    if not shape and values.max() > 9:
        raise ValueError(f"a label is {values.max()}, expected 0 to 9")
    return values


def _survey(folder: Path) -> tuple[dict[str, str], dict[Path, str]]:
    """The data set of each name that has a good file, and what is wrong with each bad file."""
    bad: dict[Path, str] = {}
    return {name: found[1] for name in NAMES if (found := _find(folder, name, bad))}, bad


def _survey_and_set_aside(folder: Path) -> dict[str, str]:
    """The data set of each name that has a good file; bad files are renamed to NAME.corrupt if possible."""
    try:
        good, bad = _survey(folder)
    except OSError as error:
        raise DatasetError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    if not good and len(_whole(bad)) > 1 and not _survey(folder)[0]:  # another process may have mended it meanwhile
        raise DatasetError(
            f"{folder} holds another data set in the same format (MNIST?): choose another --data_dir, or --data mnist"
        )
    if bad:
        try:
            with _lock(folder):
                good, bad = _survey(folder)  # another process may have been here
                for path in tuple(bad):
                    candidates = (f"{path}.corrupt{'' if i == 1 else f'-{i}'}" for i in itertools.count(1))
                    aside = path.rename(next(name for name in candidates if not Path(name).exists()))
                    log.warning("%s %s: set aside as %s", path, bad.pop(path), aside.name)
        except OSError as error:
            for path, problem in bad.items():
                log.warning("%s %s; it cannot be set aside (%s)", path, problem, error.strerror or error)
    return good


def _whole(bad: Iterable[Path]) -> set[str]:
    """The names of those bad files that are not damaged, but hold other images or labels."""
    names = set()
    for path in bad:
        name = path.name.removesuffix(".gz")
        with suppress(OSError, ValueError):
            _parse_idx(_unpacked(name, _read(path, name)), (28, 28) if "images" in name else ())
            names.add(name)
    return names


def _lock(folder: Path) -> AbstractContextManager[object]:
    return locked(folder / ".fashion-mnist.lock", LOCK_TIMEOUT, tolerated=())


@contextmanager
def locked(path: Path, timeout: float = -1, tolerated: Sequence[int] = READ_ONLY) -> Iterator[bool]:
    """Hold a lock, and say so; where its disk has none, or its folder can't be written, go on without.

    Args:
        path: Its file.
        timeout: Seconds to wait for it; negative for ever.
        tolerated: Numbers of further errors to go on after; by default the folder's, which can still be read.
    """
    lock: AbstractContextManager[object]
    try:
        lock = FileLock(path, timeout=timeout).acquire()
    except (OSError, NotImplementedError) as error:  # the latter is some versions' for ENOSYS
        if getattr(error, "errno", errno.ENOSYS) not in (*WITHOUT_LOCKS, *tolerated):
            raise
        lock = nullcontext()
    with lock:
        yield not isinstance(lock, nullcontext)


def _find(folder: Path, name: str, bad: dict[Path, str]) -> tuple[bytes, str] | None:
    """Content and data set of the first good version of a file; adds to `bad` what is wrong with others."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            try:
                return _verify(name, _read(path, name))
            except FileNotFoundError:  # another process has just set it aside
                continue
            except ValueError as error:
                bad[path] = str(error)
    return None


def _read(path: Path, name: str) -> bytes:
    with path.open("rb") as file:
        return file.read(_most_bytes(name))


def _most_bytes(name: str) -> int:
    """More bytes than any good version of a file has, compressed or not."""
    return KNOWN["full"][name][0] + (1 << 16)


def _verify(name: str, data: bytes) -> tuple[bytes, str]:
    """Unpacks `data` and returns it with the data set whose file `name` it is. Raises ValueError with what is wrong.

    Only the unpacked content counts, since copies exist that were recompressed.
    """
    content = _unpacked(name, data)
    digest = hashlib.sha256(content).hexdigest()
    for data_set, files in KNOWN.items():
        if digest == files[name][1]:
            return content, data_set
    if len(content) in (files[name][0] for files in KNOWN.values()):
        raise ValueError(f"has the right length but wrong content (SHA-256 {digest[:8]}...)")
    raise ValueError(f"holds {len(content):,} bytes instead of {KNOWN['full'][name][0]:,}")


def _unpacked(name: str, data: bytes) -> bytes:
    """The content of a file called `name`. Raises ValueError if it is damaged, or more than it can hold.

    Gzip is known by its first bytes, not by the file's name: browsers unpack a .gz file and keep its name.
    """
    limit = KNOWN["full"][name][0]
    content = data
    if data[:2] == b"\x1f\x8b":
        inflate = zlib.decompressobj(wbits=31)
        try:
            content = inflate.decompress(data, limit + 1)
        except zlib.error as error:
            raise ValueError(f"is damaged ({error})") from None
        if len(content) <= limit and not inflate.eof:
            raise ValueError(f"is truncated (it ends after {len(data):,} bytes)")
    if len(content) > limit:
        raise ValueError(f"holds more than the {limit:,} bytes expected")
    return content


def _install(folder: Path, name: str, data: bytes, data_set: str) -> None:
    """Verifies `data` and writes it; only complete and good content ever bears the final name. Raises ValueError."""
    content, found = _verify(name, data)
    if found != data_set:
        raise ValueError(f"belongs to the {found} data set, not to the {data_set} one")
    target = folder / (name if content is data else f"{name}.gz")
    with written_aside(target) as written, written.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
