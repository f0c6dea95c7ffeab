"""The errors that are shown to the user as they stand, and the one place where a program turns them into an exit code.

Exit codes: 0; 1 if a run failed; 2 for a mistake of the user's; 3 if training diverged; 130 after Ctrl-C; 143 after
another signal that asked to stop.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """A mistake that the user can mend; its message is one line: what was wrong, what was expected, what to do.

    Line breaks and control characters in what the user gave show as escapes.
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
    """A run that can't go on although its command line is right: disk full, out of memory, a process gone."""

    exit_code = 1


class Diverged(UserError):
    """Training that makes no sense to continue; the last good checkpoint is kept."""

    exit_code = 3


class Stopped(Exception):
    """Training that a signal has ended in good order.

    Args:
        message: What was saved and how to continue; empty on processes that leave it to the first one to say so.
        exit_code: 130 after Ctrl-C, else 143, as if the signal had ended the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of printing the usage."""
        raise UserError(f"{message} ({self.prog} --help)")


def run_program(name: str, run: Callable[[], int | None], interrupted: str = "Stopped by Ctrl-C.") -> int:
    """Run a program; errors of the user's, and signals, end it with one line on standard error.

    Args:
        name: The program's, for that line.
        run: What it does; may return an exit code.
        interrupted: The line after Ctrl-C.

    Returns:
        The exit code.
    """
    try:
        return run() or 0
    except UserError as error:
        if str(error):  # else another process says it
            print_error(name, error)
        return error.exit_code
    except Stopped as stopped:
        if str(stopped):
            print(f"\n{stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line for all of a run's processes
            print(f"\n{interrupted}", file=sys.stderr)
        return 130


def print_error(program: str, message: object) -> None:
    """Print a program's error on standard error, as one line."""
    print(f"{program}: error: {message}", file=sys.stderr, flush=True)


def printed_error(text: str) -> str:
    """The message of the line that `print_error` printed last, out of a program's standard error; "" if it is empty."""
    last = (text.strip().splitlines() or [""])[-1]
    return re.sub(r"^[\w.]+: error: ", "", last)


def one_line(message: str) -> str:
    """The message with every run of white space as one space."""
    return " ".join(message.split())


def plain(text: str) -> str:
    """The text with what a terminal would act on, or not show, written as escapes.

    These are control characters, line breaks, marks that turn the direction of writing, and broken surrogates.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown(path: str | Path) -> str:
    """The path as one would type it from here."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
