"""What values a file from elsewhere may hold: plain ones, not more, larger or deeper than a run's own."""

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch
import yaml
from torch import Tensor

from errors import UserError

LONGEST = 2_000_000  # characters of a text: the settings name all classes
LONGEST_WORD = 1000  # characters of one value of the settings: YAML takes 1:1:1:... for a number, at great length
DEEPEST = 30  # levels of nested values
MOST = 200_000  # values in a file
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where there is libyaml
PLAIN = (bool, int, float, str, type(None))
OF_PICTURES = ("folder", "dataset", "class_names")  # settings that `of_pictures` looks at


def check_plain(content: Any, path: str, size: float = math.inf) -> None:
    """Refuse what is neither a tensor nor a plain value, and what is too large, too deep or nested in itself.

    Raises:
        UserError: If the file holds any of these.
    """
    left, held = MOST, {}
    stack = [(content, 0)]
    while stack:
        value, depth = stack.pop()
        left -= 1
        if left < 0 or depth > DEEPEST:
            raise UserError(f"{path} holds settings within themselves, or far too many; not loaded")
        if isinstance(value, Mapping):
            stack += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list | tuple):
            stack += [(inner, depth + 1) for inner in value]
        elif not _is_plain(value):
            raise UserError(f"{path} holds a value that a checkpoint of this project never holds; not loaded")
        elif isinstance(value, Tensor):
            held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    if sum(held.values()) > size:
        raise UserError(f"{path} holds tensors larger than itself; not loaded")


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a checkpoint may hold them: a Path's text, for NumPy's and torch's numbers Python's; no objects."""
    found = {name: str(value) if isinstance(value, PurePath) else value for name, value in settings.items()}
    found |= {name: value.item() for name, value in settings.items() if getattr(value, "ndim", None) == 0}
    return {name: value for name, value in found.items() if _is_readable(value)}


def _is_readable(value: Any) -> bool:
    """Whether it can be read again without unpickling objects, such as the members of an enumeration."""
    if type(value) in (list, tuple, dict):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return all(map(_is_readable, inner))
    return type(value) in PLAIN


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        # Its data must be as large as it claims: a view may show one number a billion times.
        return (
            value.layout is torch.strided
            and value.device.type == "cpu"
            and not (value.is_quantized or value.is_complex() or value.is_nested)
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        )
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, str):
        return len(value) <= LONGEST
    return value is None or isinstance(value, float | torch.dtype)


def read_settings(text: Any, path: str, how: str = "add --model RECIPE") -> dict[str, Any]:
    """The configuration that a checkpoint holds as YAML.

    Raises:
        UserError: If it holds none. Aliases are refused, as ten lines of them can stand for a billion values.
    """
    try:
        if not isinstance(text, str) or len(text) > LONGEST:
            raise TypeError
        depth = 0
        for number, event in enumerate(yaml.parse(text, Loader=LOADER)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            long = isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_WORD
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST or long or number > MOST:
                raise TypeError
        config = yaml.load(text, Loader=LOADER)
        if not all(isinstance(config[section], dict) for section in ("model", "data")):
            raise TypeError
        if not isinstance(config.get("trainer") or {}, dict):
            raise TypeError
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, yaml.YAMLError):
        raise UserError(f"{path} does not say how it was trained; {how}") from None
    check_plain(config, path)
    return config


def check_names(content: Any, path: str) -> None:
    """Refuse names that the parser would take apart: net.init_args.x would get past what is checked about net."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            if isinstance(name, str) and re.search(r"[.+]", name):
                raise UserError(f"{path} holds a setting called {name[:80]!r}, as no run's file does; not loaded")
            check_names(value, path)
    elif isinstance(content, list | tuple):
        for value in content:
            check_names(value, path)


def recipe_name(checkpoint: Mapping[str, Any]) -> str:
    """The recipe's name that a checkpoint holds, as a relative path that never goes up; "unnamed" without one."""
    text = checkpoint.get("recipe")
    parts = re.split(r"[/\\]", text) if isinstance(text, str) else []
    safe = ["".join(c if c.isprintable() and c not in '<>:"|?*[]$`' else "_" for c in part)[:100] for part in parts]
    return "/".join([part for part in safe if part.strip(". ")][:4]) or "unnamed"


def of_pictures(settings: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a file may say of the pictures it was trained on.

    The names of the classes are any text, which is shown and nothing else. Where a folder lies the user says, and a
    class's path is for the user's command line alone; a data set may be named as torchvision's are, in one word.

    Raises:
        UserError: If the classes are no list of names.
    """
    names: Any = settings.get("class_names")
    listed = isinstance(names, list) and 0 < len(names) <= 100_000
    if not listed or not all(isinstance(name, str) and len(name) <= 255 for name in names):
        raise UserError(f"{path} does not name the classes of its pictures; not loaded")
    dataset = str(settings.get("dataset"))
    known = re.fullmatch(r"[a-z0-9_]{1,40}", dataset)
    return {"folder": "", "dataset": dataset if known else "", "class_names": list(names)}
