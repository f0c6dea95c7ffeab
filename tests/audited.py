"""Uses one checkpoint in every way there is, in a process that reports what it does to the machine.

Imported by forked processes: nothing heavy that `commands.start_server` has not imported already.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import DATA

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events that change files, and how many paths each begins with. Of a link both count: its target is changed through it.
CHANGES = dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), 1)
CHANGES |= dict.fromkeys(("shutil.rmtree", "os.setxattr", "os.removexattr"), 1)
CHANGES |= dict.fromkeys(("os.rename", "os.link", "os.symlink", "shutil.move"), 2)
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "socket.connect")
FLAGS = [f"--data_dir={DATA}", "--accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.devices=1"]
SHORT = ["--max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]


def named(path: Any) -> str | None:
    """A path as text; None for a file that is open already."""
    return None if isinstance(path, int) else os.fsdecode(path).removeprefix("b'")  # TensorBoard's


def noticed(event: str, args: tuple[Any, ...], mine: Path) -> str | None:
    """What an audit event says of a process, a connection, or a change of files elsewhere than in a folder."""
    if event in STARTS:
        harmless = event == "subprocess.Popen" and args[1][:2] in (["git", "describe"], ["uname", "-p"])
        return None if harmless else f"{event} {args[:2]}"
    writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
    for path in map(named, args[: 1 if writes else CHANGES.get(event, 0)]):
        place = Path(os.path.abspath(path or ""))  # noqa: PTH100 - links as they stand
        if path is not None and not any(place.is_relative_to(allowed) for allowed in (mine, "/dev", "/proc/self")):
            return f"{event} {path}"
    return None


def watch(folder: Path) -> None:
    """Report on standard error what starts a process, connects, or changes files elsewhere than in folder/logs."""

    def see(event: str, args: tuple[Any, ...]) -> None:
        if seen := noticed(event, args, folder / "logs"):
            os.write(2, f"AUDIT {seen}\n".encode(errors="replace"))

    sys.addaudithook(see)


def use_everywhere(folder: Path) -> None:
    """Use folder/spoilt.ckpt; what is neither right nor refused in one line is reported on standard error."""
    import train
    from datamodules import FashionMNISTDataModule
    from errors import UserError
    from lit_modules import LitClassifier
    from weights.trained import load_trained

    path = folder / "spoilt.ckpt"
    ways: dict[str, Callable[[], Any]] = {
        "load_trained": lambda: load_trained(path),
        "LitClassifier": lambda: LitClassifier.load_from_checkpoint(path),
        "FashionMNISTDataModule": lambda: FashionMNISTDataModule.load_from_checkpoint(path),
        "test": lambda: train.main(["test", "--ckpt_path=spoilt.ckpt", "--trainer.limit_test_batches=1", *FLAGS]),
        "fit": lambda: train.main(["fit", "--ckpt_path=spoilt.ckpt", *SHORT, *FLAGS]),
    }
    watch(folder)
    for name, way in ways.items():
        try:
            code = way()
            if isinstance(code, int) and code not in (0, 1, 2, 3):
                print(f"CODE {name} {code}", file=sys.stderr)
        except UserError as error:
            if len(str(error).splitlines()) != 1 or not str(error).isprintable():
                print(f"LINES {name} {str(error)!r}", file=sys.stderr)
        except BaseException:
            print(f"TRACEBACK {name}\n{traceback.format_exc()}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
