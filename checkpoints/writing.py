"""Writing checkpoints so that a crash at any moment leaves the last good one in place."""

import io
import os
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.serialization import get_unsafe_globals_in_checkpoint

from errors import RunError, UserError, replace_file

try:
    import fcntl
except ImportError:  # on Windows, where a file that is open can't be deleted
    fcntl = None  # type: ignore[assignment]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes into a temporary file in the target folder, waits until it is on the disk, and renames it.

    (Lightning writes into the system's temporary folder and moves the file, which between file systems is a copy that
    can be cut short.) The file gets the permissions that the umask gives any file. What killed processes left behind
    is removed; a process that still writes holds a lock on its file.

    Loading never unpickles anything but tensors and plain types.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write one checkpoint.

        Raises:
            RunError: If it can't be written; an older file of the same name is then untouched.
            UserError: If a callback's state holds what could not be read again (see `_normalised`).
        """
        path = Path(path)
        partial = _partial(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(path.parent)
            with partial.open("xb") as file:
                if fcntl:
                    with suppress(OSError):  # of a file system without locks, where nothing is removed either
                        fcntl.flock(file, fcntl.LOCK_EX)
                torch.save(_normalised(checkpoint), file)
                file.flush()
                os.fsync(file.fileno())
                _check_readable(partial, checkpoint)
                if fcntl:
                    replace_file(partial, path)  # while it is locked
            if not fcntl:
                replace_file(partial, path)  # Windows renames no open file
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, OSError):  # torch.save hides it behind its own
                cause = cause.__context__
            if not isinstance(cause, OSError):
                raise
            kept = "the checkpoint saved before it is untouched" if path.exists() else "nothing was saved before"
            raise RunError(f"the checkpoint {path} can't be written: {cause.strerror}; {kept}") from None
        finally:
            with suppress(OSError):  # already renamed, or never written
                partial.unlink()

    def link_checkpoint(self, written: str | Path, path: str | Path) -> bool:
        """Give a checkpoint that was just written a second name; returns whether the file system can.

        Files are only ever replaced, never changed, so each name keeps its content when the other gets a new one.
        """
        path = Path(path)
        partial = _partial(path)
        try:
            os.link(written, partial)
            replace_file(partial, path)
        except OSError:
            return False
        finally:
            with suppress(OSError):  # already renamed, or never made
                partial.unlink()
        _sync_folder(path.parent)
        return True

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read one checkpoint, only as tensors and plain types, whatever `weights_only` says."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


def _partial(path: Path) -> Path:
    """The name of a file that is not complete yet."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _normalised(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with plain values as plain values: reading it allows no classes but tensors'."""
    return {name: value if name == "state_dict" else _plain(value) for name, value in checkpoint.items()}


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, bytearray):
        return bytes(value)
    for kind in (int, float, str, bytes):
        if isinstance(value, kind):  # such as an instance of jsonargparse's PositiveInt or NumPy's float64
            return kind(value)  # type: ignore[arg-type]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        items = {_plain(key): _plain(inner) for key, inner in value.items()}
        return OrderedDict(items) if isinstance(value, OrderedDict) else items
    if isinstance(value, list | deque):
        return [_plain(inner) for inner in value]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return tuple(_plain(inner) for inner in value)
    return value


def _check_readable(file: Path, checkpoint: dict[str, Any]) -> None:
    unreadable = get_unsafe_globals_in_checkpoint(file)
    if not unreadable:
        return
    for name, state in checkpoint.get("callbacks", {}).items():
        content = io.BytesIO()
        torch.save(_plain(state), content)
        content.seek(0)
        if found := get_unsafe_globals_in_checkpoint(content):
            raise UserError(
                f"the callback {str(name).partition('{')[0]} keeps {', '.join(found)} in its state, which a checkpoint "
                "can't hold (tensors and plain values alone); leave it out of --trainer.callbacks"
            )
    raise UserError(f"the checkpoint would hold {', '.join(unreadable)}: tensors and plain values alone can be saved")


def _remove_stale(folder: Path) -> None:
    for partial in folder.glob("*.ckpt.*.partial"):
        with suppress(OSError), ExitStack() as stack:
            if fcntl:
                file = stack.enter_context(partial.open("rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if a living process is writing
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the renaming survive a power failure."""
    with suppress(OSError, AttributeError):  # where folders can't be opened
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
