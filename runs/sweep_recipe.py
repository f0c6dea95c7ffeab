"""What a sweep finds, as a recipe that train.py takes."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from cli.command import Command
from cli.recipes import PROJECT, load_yaml, recipes
from errors import UserError, shown, typed, writable, written_aside
from runs.search_space import SweepRequest
from runs.settings import kind, leaves

MARK = "with the settings that a sweep found"  # in the header of each recipe written here


def check_output(output: Path) -> None:
    """Never overwrite a recipe that a person wrote, nor search for one that can't be written."""
    if output.is_dir() or (output.exists() and MARK not in output.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"{output} exists and was not written by a sweep; give another --output")
    if not writable(output) or (output.exists() and not os.access(output, os.W_OK)):
        raise UserError(f"{output} can't be written; give another --output")


def write_recipe(
    output: Path,
    record: dict[str, Any],
    accuracy: float,
    request: SweepRequest,
    command: Command,
    searched: Iterable[str],
) -> None:
    """Write the best trial's configuration, without defaults and settings of the machine.

    Args:
        output: The file.
        record: The trial's.
        accuracy: The trial's, on the validation images.
        request: What was asked of the sweep.
        command: The command line of its trials.
        searched: The settings that were searched.
    """
    files = [load_yaml(path) for path in command.configs]
    files += [load_yaml(path).get("fit") or {} for path in command.outer_configs]
    flags = {flag.lstrip("-").partition("=")[0].rstrip("+").replace(".init_args", "") for flag in command.overrides}
    given = flags | set(searched) | {name for content in files for name in leaves(content)}

    def wanted(name: str, value: Any) -> bool:
        if value is None or not kind(name).recipe:
            return value is None and name in given and kind(name).recipe
        if "." not in name:  # a setting of the run, off unless it was given
            return value is not False
        return name.endswith(".class_path") or any(name == prefix or name.startswith(f"{prefix}.") for prefix in given)

    config = _selected(record["config"], wanted)
    epoch = next((one["epoch"] for one in record["epochs"] if one.get("val/accuracy") == accuracy), None)
    where = f" (epoch {epoch})" if epoch else ""  # it may have been measured within an epoch
    header = [
        f"# {request.recipe} {MARK}",
        f"# Command: {to_train(output)}",
        f"# Expected: {accuracy:.4f} validation accuracy{where}; not measured on the test images",
        f"# Source: {request.command}",
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config, sort_keys=False)
    with written_aside(output) as written:
        written.write_text("\n".join([*header, text]), encoding="utf-8")


def _selected(config: dict[str, Any], wanted: Any, prefix: str = "") -> dict[str, Any]:
    """The part of nested mappings whose leaves, under dotted names without `init_args`, are wanted."""
    selected = {}
    for key, value in config.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        if isinstance(value, dict):
            if inner := _selected(value, wanted, name):
                selected[key] = inner
        elif wanted(name, value):
            selected[key] = value
    return selected


def to_train(output: Path) -> str:
    """The command that trains a recipe's file, by its name where it has one."""
    names = {PROJECT / "configs" / f"{name}.yaml": name for name in (*recipes(), output.stem)}
    return typed(["python", "train.py", "--model", names.get(output.resolve(), shown(output))])
