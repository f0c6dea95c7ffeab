"""Command lines that take flags of their own and pass all others on to train.py.

Imports nothing heavy.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from cli.flags import refuse_pasted_dashes, take_flag
from errors import OneLineParser, UserError, expanded


class Parser(OneLineParser):
    """A parser whose errors name the flag first, and which tells its own flags from those of train.py."""

    def __init__(self, prog: str, description: str, refused: Mapping[str, str]) -> None:
        super().__init__(
            prog=f"python {prog}",
            description=description,
            epilog="All other flags, such as --max_epochs, --accelerator or --data_dir, are passed on to train.py.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )
        self.refused = refused

    @property
    def own(self) -> tuple[str, ...]:
        """Its own flags."""
        return tuple(self._option_string_actions)

    def split(self, arguments: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
        """The values of its own flags, or None if help was asked for; and the flags for train.py.

        Raises:
            UserError: If a flag is refused or begins with a pasted dash, or one of its own is not valid.
        """
        refuse_pasted_dashes(arguments)
        mine: list[str] = []
        passed: list[str] = []
        tokens = list(arguments)
        while tokens:
            token = tokens.pop(0)
            name = token.partition("=")[0]
            if name in ("-h", "--help"):
                return None, []
            if name in self.own or not token.startswith("-"):
                mine.append(token)
            else:
                passed += take_flag(token, tokens, self.refused)
        return self.parse_intermixed_args(mine), passed

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` with one line that begins with the flag."""
        if match := re.fullmatch(r"argument (--\w+): (.*)", message):
            reason = "needs a value" if match[2].startswith("expected") else match[2]
            message = f"{match[1]} {reason}"
        raise UserError(f"{message} ({self.prog} --help)")


def at_least_one(text: str) -> int:
    """The integer in a flag's value."""
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def path(text: str) -> Path:
    """The path in a flag's value."""
    if not text:
        raise argparse.ArgumentTypeError("needs a value, got ''")
    return Path(expanded(text))


def yaml_file(text: str) -> Path:
    """The YAML file in a flag's value."""
    if not text.endswith((".yaml", ".yml")):
        raise argparse.ArgumentTypeError(f"must be a file name that ends in .yaml, got {text!r}")
    return path(text)


def one_of(*names: str) -> Callable[[str], str]:
    """A flag's value must be one of these."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {text!r}")
        return text

    return check
