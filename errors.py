"""The errors that are shown to the user as they stand, and the one place where a program turns them into an exit code.

Exit codes: 0; 1 if a run failed; 2 for a user's mistake; 3 if training diverged; 130 after Ctrl-C; 143 after
another signal that asked to stop.
"""

import argparse
import errno
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

if sys.version_info < (3, 10):  # noqa: UP036  # a system's own Python, where the environment was not activated
    sys.exit(f"error: Python 3.10 or newer is needed, this is {sys.version.split()[0]}: use .venv's")

# Of a pipe whose reader is gone, and of a terminal that was closed; Windows has its own for the former.
NO_READER = (errno.EPIPE, errno.EIO, *([errno.EINVAL] if os.name == "nt" else []))
# Errors caused by the disk, not by the program.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
# Of locks, on a disk that has none.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # two numbers on a Mac
# The modules of requirements.txt, and what they bring along.
REQUIRED = "filelock jsonargparse lightning numpy PIL rich tensorboard torch torchmetrics torchvision yaml"
# Signals that ask a program to stop; Windows has the first two alone.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class UserError(Exception):
    """A mistake that the user can fix; its message is one line: what was wrong, what was expected, what to do.

    Line breaks and control characters in the user's input are shown as escapes.
    """

    exit_code = 2

    def __str__(self) -> str:
        return plain(super().__str__())


class MissingPackage(UserError):
    """An optional package that is not installed.

    Args:
        what: What needs it, with its verb: "the page needs".
        package: Its name.
    """

    def __init__(self, what: str, package: str) -> None:
        super().__init__(f"{what} the package {package}: pip install -r requirements-extras.txt")


class RunError(UserError):
    """A run that can't go on although its command line is valid: disk full, out of memory, a process died."""

    exit_code = 1


class Diverged(UserError):
    """Training that is not worth continuing; the last good checkpoint is kept."""

    exit_code = 3


class Stopped(BaseException):
    """A program that was stopped cleanly by a signal; like `KeyboardInterrupt`, not caught by `except Exception`.

    Args:
        message: What was saved and how to continue; empty on processes that leave it to the first one to say so.
        exit_code: 130 after Ctrl-C, else 143, as if the signal had ended the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def expanded(text: str) -> str:
    """The path with the home folder for a ~, which not every shell replaces.

    Raises:
        UserError: If there is no such user, nor anything here of that name: Office's ~$page.png, say.
    """
    path = os.path.expanduser(text)  # noqa: PTH111  # pathlib's turns every / on Windows
    if path.startswith("~") and not os.path.lexists(Path(path).parts[0]):
        raise UserError(f"{text}: nobody here has that home folder; give the path in full, or ./{text} if it is meant")
    return path


def after_failed_fetch(reason: str, otherwise: str) -> str:
    """What to do first; a Mac's Python, from python.org, trusts no server before this."""
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return "open Install Certificates.command in Python's folder in Applications (on a Mac)"
    return otherwise


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which replaces the ~ in a path."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self.register("type", Path, lambda text: Path(expanded(text)))

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of printing the usage."""
        raise UserError(f"{message} ({self.prog} --help)")


def run_program(name: str, run: Callable[[], int | None], interrupted: str = "Stopped by Ctrl-C.") -> int:
    """Run a program; user errors and signals end it with one line on standard error.

    Args:
        name: The program's, for that line.
        run: What it does; may return an exit code.
        interrupted: The line after Ctrl-C.

    Returns:
        The exit code.
    """
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
    try:
        if not os.environ.get("LOCAL_RANK", "0").isdecimal():  # which torchmetrics and Lightning read
            raise UserError(f"LOCAL_RANK is {os.environ['LOCAL_RANK']!r}, not a whole number: unset it")
        code = run() or 0
        sys.stdout.flush()  # not when Python ends, where a closed pipe can't be answered any more
        return code
    except UserError as error:
        if str(error):  # else another process reports it
            print_error(name, error)
        return error.exit_code
    except Stopped as stopped:
        if str(stopped):
            print(f"\n{stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        if is_first_process():
            print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        return _report_missing(name, error)
    except OSError as error:
        if error.errno not in UNWRITABLE or (isinstance(error, PermissionError) and error.filename is None):
            raise
        print_error(name, plain(unwritable(error)))
        return 2 if isinstance(error, PermissionError) else 1
    finally:
        sys.stdout, sys.stderr = kept


def unwritable(error: OSError) -> str:
    """What to say of an error with an `errno` in `UNWRITABLE`."""
    how = "read or written" if isinstance(error, PermissionError) else "written"
    return f"{error.filename or 'a file'} can't be {how}: {error.strerror}"


def is_first_process() -> bool:
    """Whether this process speaks for a run's others: torchrun's of the same machine, SLURM's of all machines."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def signal_name(signum: int) -> str:
    """The signal's name as the user knows it."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def stopped_code(signum: int) -> int:
    """The exit code of a process that was asked to stop."""
    return 130 if signum == signal.SIGINT else 143


def leave_signals_to_main(worker: int) -> None:
    """Signals go to the whole process group; the main process ends the workers when it has saved a checkpoint."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def importing(name: str) -> Iterator[None]:
    """For the imports of a program: a missing package ends it with one line, and Ctrl-C ends it at once."""
    try:
        with ended_by_ctrl_c():
            yield
    except ModuleNotFoundError as error:
        sys.exit(_report_missing(name, error))


def _report_missing(program: str, error: ModuleNotFoundError) -> int:
    """Name the package of requirements.txt that is missing, and what to do; returns the exit code."""
    if str(error.name).partition(".")[0] not in REQUIRED.split():
        raise error
    python, make = ".venv/bin/python", "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    if os.name == "nt":
        python, make = r".venv\Scripts\python", r"py -m venv .venv, then .venv\Scripts\pip install -r requirements.txt"
    print_error(
        program,
        f"the package {error.name} is missing in {sys.executable}: use {python}, or make it: {make}",
    )
    return 2


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once, where there is nothing to lose.

    For imports: libraries take a KeyboardInterrupt in theirs for errors of many kinds.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return

    def end(signum: int, frame: Any) -> None:
        with suppress(OSError):  # nobody reads it: Ctrl-C ends `| tee log` too
            os.write(2, b"\nStopped by Ctrl-C.\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Output:
    """Standard output or error that takes any text, and lets go of a pipe that nobody reads, or of a closed terminal.

    Neither is a reason to stop a training. Characters that the locale's encoding lacks are escaped.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # None where it is closed
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        if error.errno not in NO_READER:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def print_error(program: str, message: object) -> None:
    """Print a program's error on standard error, as one line."""
    print(f"{program}: error: {message}", file=sys.stderr, flush=True)


def print_warning(message: object) -> None:
    """Print a warning of train.py on standard error, as one line."""
    print(f"train.py: warning: {one_line(str(message))}", file=sys.stderr, flush=True)


def printed_error(text: str) -> str:
    """The message that `print_error` printed last, taken from a program's standard error; "" if that is empty."""
    last = (text.strip().splitlines() or [""])[-1]
    return re.sub(r"^[\w.]+: error: ", "", last)


def one_line(message: str) -> str:
    """The message with every run of white space as one space."""
    return " ".join(message.split())


def count(number: int, noun: str) -> str:
    """The number with its noun, in the plural where it needs one: "1 epoch", "2,000 batches"."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith(('s', 'tch')) else 's'}"


def plain(text: str) -> str:
    """The text with everything that a terminal would act on, or not show, written as escapes.

    These are control characters, line breaks, marks that change the direction of writing, and broken surrogates.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def replace_file(written: Path, path: Path) -> None:
    """Give a file that was written its final name; on Windows once nobody has the former one open, or scans the new.

    Raises:
        PermissionError: If that takes longer than two seconds.
    """
    for _ in range(20):
        with suppress(PermissionError):
            written.replace(path)
            return
        time.sleep(0.1)
    written.replace(path)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """The name of a new file beside the path, which replaces it at the end, and is removed if there is an error."""
    written = path.with_name(f".{path.name}.{os.urandom(8).hex()}{path.suffix}")
    try:
        yield written
        replace_file(written, path)
    finally:
        with suppress(OSError):  # already renamed, or never written
            written.unlink()


def writable(path: Path) -> bool:
    """Whether a file or folder can be made, or made anew, under this path: Windows tells only whoever tries."""
    try:
        trial = next(folder for folder in path.absolute().parents if folder.exists()) / f".{os.urandom(8).hex()}"
        trial.touch()
        trial.unlink()
    except OSError:
        return False
    return True


def shown(path: str | Path) -> str:
    """The path as one would type it from here; with slashes on Windows too, where every shell takes them unquoted."""
    try:
        return Path(path).resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return Path(path).as_posix()


def typed(arguments: Sequence[str]) -> str:
    """The command line as one types it, quoted for the shells of this system; paths in it as `shown` gives them."""
    if os.name != "nt":
        return shlex.join(arguments)
    # Double quotes mean the same to cmd and PowerShell; neither leaves brackets and the like alone without them.
    return " ".join(word if re.fullmatch(r"[\w./\\:=+-]+", word) else f'"{word}"' for word in arguments)
