"""What each group of runs is called: its recipe, and in brackets what was changed in it.

Imports nothing heavy.
"""

import ast
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from cli.recipes import read_recipe
from errors import UserError
from runs.settings import FOLLOWING, kind, leaves

CLASS, MACHINE = ".class_path", "machine"
DATA = ("data.folder", "data.dataset")
Settings = dict[str, Any]  # by dotted name, without `init_args`


def name_all(runs: Sequence[tuple[str, Settings]]) -> tuple[list[str], list[str]]:
    """A name for each run, and what was changed in all of them, which is in no name.

    Args:
        runs: The recipe and the settings of each.
    """
    changes = [_changes(recipe, mine, [other for name, other in runs if name == recipe]) for recipe, mine in runs]
    # What was changed in a recipe of the user's own is not known; its runs share whatever they have.
    have = [
        changed if recipe_settings(recipe) else [_in_words(*one) for one in mine.items() if not _is_open(*one)]
        for (recipe, mine), changed in zip(runs, changes, strict=True)
    ]
    shared = [text for text in dict.fromkeys(chain(*changes)) if all(text in texts for texts in have)]
    own = [", ".join(text for text in texts if text not in shared) for texts in changes]
    return [f"{recipe} ({texts})" if texts else recipe for (recipe, _), texts in zip(runs, own, strict=True)], shared


def _changes(recipe: str, settings: Settings, others: Sequence[Settings]) -> list[str]:
    """What was changed in a recipe, a few words each, in the recipe's order.

    A setting that the recipe leaves to a default counts as changed in every run of the recipe as soon as they differ
    in it, unless the default is known.
    """
    written = recipe_settings(recipe)
    classes = {name for name in (*written, *settings) if name.endswith(CLASS)}

    def is_changed(name: str, value: Any) -> bool:
        owner = next((one for one in classes if f"{name}.".startswith(one.removesuffix(CLASS) + ".")), "")
        if name in written:
            replaced = name != owner and not _agree(written.get(owner), settings.get(owner))
            return not _agree(written[name], value, name) and not (replaced and value is None)
        default = kind(name).default
        if owner and default is None:
            default = class_defaults(str(settings.get(owner))).get(name.removeprefix(owner.removesuffix(CLASS) + "."))
        if written and (default is not None or not owner) and name != MACHINE:
            return value is not None and not _agree(default, value, name)
        comparable = [one for one in others if one.get(owner) == settings.get(owner)]
        is_set = bool(value) or (_zero_counts(name) and not _is_open(name, value))
        return is_set and not all(_agree(value, one.get(name), name) for one in comparable)

    names = [name for name in {**written, **settings} if (name in settings or kind(name).parts) and kind(name).named]
    if any(map(settings.get, DATA)):
        same = [one for one in others if all(one.get(name) == settings.get(name) for name in DATA)]
        differ = {name for name in FOLLOWING if any(one.get(name) != settings.get(name) for one in same)}
        names = [name for name in names if name not in FOLLOWING or name in differ]
    return [_in_words(name, settings.get(name)) for name in names if is_changed(name, settings.get(name))]


@cache
def recipe_settings(recipe: str) -> Settings:
    """What the file of one of the project's recipes says; empty if there is no such recipe."""
    try:
        return leaves(read_recipe(recipe))
    except UserError:
        return {}


@cache
def class_defaults(class_path: str) -> Settings:
    """The arguments that a network in models/ takes if none are given, from its source; empty for other classes."""
    module, _, name = class_path.rpartition(".")
    file = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body if module.startswith("models.") else []
    except (OSError, SyntaxError, ValueError, RecursionError):  # of a network of the user's own
        return {}
    members = [member for one in body if isinstance(one, ast.ClassDef) and one.name == name for member in one.body]
    found = {}
    for function in members:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            given = zip(reversed(function.args.args), reversed(function.args.defaults), strict=False)
            found = {one.arg: value.value for one, value in given if isinstance(value, ast.Constant)}
    return found


def _agree(written: Any, value: Any, name: str = "") -> bool:
    """Whether a value is what a recipe says: numbers may be written in any way, and objects without their defaults."""
    if isinstance(written, dict) and isinstance(value, dict):
        return all(key in value and _agree(one, value[key]) for key, one in written.items())
    if isinstance(written, list) and isinstance(value, list):
        return len(written) == len(value) and all(map(_agree, written, value))
    if _is_open(name, written) != _is_open(name, value):
        return False
    try:
        return float(written or 0) == float(value or 0)
    except (TypeError, ValueError):
        return str(written).rpartition(".")[2] == str(value).rpartition(".")[2]


def _is_open(name: str, value: Any) -> bool:
    """Whether the setting is null, where 0 or False is a value."""
    return value is None and _zero_counts(name)


def _zero_counts(name: str) -> bool:
    """Whether 0, or False, is something else than no value."""
    return False not in kind(name).off


def _in_words(name: str, value: Any) -> str:
    label = name.removesuffix(CLASS).rpartition(".")[2]
    if name.endswith(CLASS) and value:
        return str(value).rpartition(".")[2]
    if value is None or isinstance(value, bool):
        return label if value else f"no {label}"
    if isinstance(value, list) and all(isinstance(one, dict) and "class_path" in one for one in value):
        value = ", ".join(str(one["class_path"]).rpartition(".")[2] for one in value)
    if isinstance(value, float):
        value = f"{value:.6g}"
    return str(value) if label == MACHINE else f"{label} {value}"
