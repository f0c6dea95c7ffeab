"""Recipes: their names, their files, and the configuration that train.py makes of them."""

import difflib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, one_line, printed_error

PROJECT = Path(__file__).resolve().parents[1]
# For processes of train.py whose output is read; else they take the terminal's encoding, which may lack characters.
UTF_8 = {"PYTHONIOENCODING": "utf-8"}


def recipes() -> dict[str, Path]:
    """Every recipe in configs/ and its sub-folders: name to file."""
    folder = PROJECT / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def is_recipe(path: str | Path) -> bool:
    """Whether a file lies in configs/."""
    return Path(path).resolve().is_relative_to(PROJECT / "configs")


def recipe_path(value: str) -> Path:
    """The file of a recipe that is given by its name or its path.

    Raises:
        UserError: If there is none.
    """
    known = recipes()
    if value in known:
        return known[value]
    if value.endswith(".ckpt"):
        raise UserError(f"--model {value} names a checkpoint, not a recipe; give --ckpt_path {value}")
    if value.endswith((".yaml", ".yml")) or os.sep in value:
        path = Path(value)
        if path.is_file():
            return path
        hint = did_you_mean((path.parent / path.stem).as_posix().rpartition("configs/")[2], known)
        raise UserError(f"the recipe file {value} does not exist{hint}")
    in_order = sorted(known, key=lambda name: ("/" in name, name))
    hint = did_you_mean(value, known) or f"; the recipes are: {', '.join(in_order)}"
    raise UserError(f"unknown recipe {value!r}{hint}")


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, duplicate keys refused.

    Raises:
        UserError: If the file is missing, is not YAML, is not a mapping or names a key twice.
    """
    try:
        text = path.read_bytes()  # YAML tells UTF-8 and UTF-16, which PowerShell's > writes, by their first bytes
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a YAML file was expected") from None
    except (OSError, ValueError) as error:  # the latter if its name holds a zero byte
        raise UserError(f"{path} can't be read as a YAML file: {error}") from None
    try:
        content = yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {one_line(str(error))}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no settings; a mapping with model, data and trainer was expected")
    return content


def read_recipe(recipe: str) -> dict[str, Any]:
    """The content of one of the project's recipes, by its name.

    Raises:
        UserError: If there is none of that name.
    """
    known = recipes()
    if recipe not in known:
        raise UserError(f"there is no recipe {recipe!r}; there are: {', '.join(known)}")
    return load_yaml(known[recipe])


def resolved(recipe: str, flags: Iterable[str]) -> dict[str, Any]:
    """The configuration that train.py, in a process of its own, makes of a recipe and flags.

    Raises:
        UserError: If it is not valid.
    """
    command = [sys.executable, str(PROJECT / "train.py"), "fit", "--model", recipe, *flags, "--print_config"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | UTF_8)
    if result.returncode:
        raise UserError(printed_error(result.stderr) or f"exit code {result.returncode}")
    try:
        return yaml.safe_load(result.stdout)
    except yaml.YAMLError:
        first = result.stdout.lstrip().partition("\n")[0]
        raise UserError(f"a module of yours prints {first!r} when it is imported; take that out") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


class _UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML in which a mapping may hold a key only once."""

    def flatten_mapping(self, node: Any) -> None:
        """Look at the keys before those of other mappings are merged in (`<<`), which these may replace."""
        seen = set()
        for key_node, _ in node.value if not hasattr(node, "seen") else ():
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    line = key_node.start_mark.line + 1
                    raise yaml.YAMLError(f"the key {key_node.value!r} appears twice, the second time in line {line}")
                seen.add(key_node.value)
        node.seen = True
        super().flatten_mapping(node)
