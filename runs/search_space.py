"""The space of a sweep: which settings to try, and which values of each, as written on the command line.

Imports nothing heavy.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from cli.flags import FLAGS
from cli.recipes import did_you_mean
from errors import UserError

Check = Callable[[str], str]
GROUPS = ("model", "data", "trainer")
# Dotted name, without `init_args`, of what each short flag stands for.
TARGETS = {
    flag.lstrip("-"): entry.target.lstrip("-").partition("=")[0].replace(".init_args", "")
    for flag, entry in FLAGS.items()
}
# How the values of some settings are checked.
CHECKS = {target: FLAGS[f"--{flag}"].check for flag, target in TARGETS.items() if target}
# What a trial's accuracy is measured with: settings that differ there can't be compared.
FIXED = {
    "seed_everything": "chance is nothing to choose; give --seed N for all trials",
    "data.val_size": "the trials are compared on the same validation images",
    "data.split_seed": "the trials are compared on the same validation images",
    "data.data_dir": "the trials are compared on the same images",
}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Choice:
    """Values as they stand on the command line."""

    values: tuple[str, ...]


# Dotted name of each setting, without `init_args`, and what to try for it.
Space = dict[str, Range | Choice]


def add_setting(space: Space, setting: str) -> None:
    """Add one setting, KEY=VALUES as on the command line, to a space.

    Raises:
        UserError: If the key is unknown, can't be searched or is there already, or the values make no sense.
    """
    key, equals, values = setting.partition("=")
    key = key.lstrip("-")
    if not equals or not key or not values:
        raise UserError(f"{setting!r} in --space is not KEY=VALUES, such as lr=log:1e-4..1e-2 or batch_size=64,128")
    name = _name(key)
    if name in FIXED:
        raise UserError(f"{key} can't be searched: {FIXED[name]}")
    if name in space:
        raise UserError(f"{key} stands twice in --space")
    space[name] = _values(key, values, CHECKS.get(name))


def _name(key: str) -> str:
    """The setting's dotted name, without `init_args`."""
    name = TARGETS.get(key, key).replace(".init_args", "")
    if name in FIXED or name.startswith(tuple(f"{group}." for group in GROUPS)):
        return name
    searchable = [flag for flag, target in TARGETS.items() if target.startswith(GROUPS)]
    if key in TARGETS:
        raise UserError(f"{key} can't be searched; settings of {', '.join(GROUPS)} can")
    hint = did_you_mean(key, searchable) or f"; a short flag or a setting of {', '.join(GROUPS)} was expected"
    raise UserError(f"unknown setting {key} in --space{hint}")


def _values(key: str, text: str, check: Check | None) -> Range | Choice:
    log = text.startswith("log:")
    low, dots, high = text.removeprefix("log:").partition("..")
    if dots and "," not in text:
        return _range(key, low, high, log, check)
    if log:
        raise UserError(f"{key}={text} in --space: log: goes with a range, such as log:1e-4..1e-2")
    values = re.split(r",(?![^\[]*\])", text)  # not at the commas inside a list's brackets
    if len(values) < 2:
        raise UserError(
            f"{key} has one value in --space, {text}; give several, a range LOW..HIGH, or a flag of train.py"
        )
    for value in values:
        if values.count(value) > 1 or not value:
            raise UserError(f"{key}={text} in --space: each choice must stand there once, and none be empty")
        if check:
            _check(key, value, check)
    return Choice(tuple(values))


def _range(key: str, low: str, high: str, log: bool, check: Check | None) -> Range:
    shown = f"{key}={'log:' if log else ''}{low}..{high} in --space"
    try:
        start, end = float(low), float(high)
    except ValueError:
        raise UserError(f"{shown}: two numbers were expected, LOW..HIGH") from None
    if not (math.isfinite(start) and math.isfinite(end) and start < end):
        raise UserError(f"{shown}: the first number must be below the second, and both finite")
    if log and start <= 0:
        raise UserError(f"{shown}: a logarithm needs numbers above 0")
    if check:
        _check(key, low, check)
        _check(key, high, check)
    return Range(start, end, log, whole=all(re.fullmatch(r"[+-]?\d+", value) for value in (low, high)))


def _check(key: str, value: str, check: Check) -> None:
    try:
        if value == "auto":
            raise ValueError("a value; auto is found by trial as it is")
        check(value)
    except ValueError as expected:
        raise UserError(f"{key} must be {expected}, got {value!r} in --space") from None
