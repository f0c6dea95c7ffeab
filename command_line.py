"""The short flags and recipe names of `train.py`, translated into LightningCLI's long form.

Imports nothing heavy: `--help` and plain mistakes are answered from here.
"""

import difflib
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from errors import UserError

PROJECT = Path(__file__).resolve().parent
SUBCOMMANDS = {
    "fit": "train only",
    "validate": "measure a checkpoint on the validation images",
    "test": "measure a checkpoint on the 10,000 test images",
    "predict": "class probabilities of the test images as CSV",
}


def _integer(least: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise ValueError(f"an integer of at least {least}")
        return text

    return check


def _positive_number(text: str) -> str:
    try:
        valid = 0 < float(text) < math.inf
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("a positive number")
    return text


def _epochs(text: str) -> str:
    return text if text == "-1" else _integer(1)(text)


def _text(text: str) -> str:
    if not text:
        raise ValueError("a value")
    return text


class Flag(NamedTuple):
    """One short flag: what it stands for, how its value is checked (None: it takes none), its line in `--help`."""

    target: str
    check: Callable[[str], str] | None
    metavar: str
    help: str


FLAGS = {
    "--model": Flag("", _text, "RECIPE", "recipe to train (list below), or a path to a YAML file"),
    "--accelerator": Flag("--trainer.accelerator", _text, "NAME", "cpu, gpu, mps or auto (default: auto)"),
    "--devices": Flag("--trainer.devices", _text, "N", "number of devices or processes, or auto"),
    "--num_nodes": Flag("--trainer.num_nodes", _integer(1), "N", "number of machines"),
    "--precision": Flag("--trainer.precision", _text, "P", "32, bf16-mixed, 16-mixed, ... (GPUs: bf16-mixed)"),
    "--max_epochs": Flag("--trainer.max_epochs", _epochs, "N", "passes over the training images"),
    "--batch_size": Flag("--data.batch_size", _integer(1), "N", "training images a step, on each device"),
    "--lr": Flag("--model.optimizer.init_args.lr", _positive_number, "X", "learning rate"),
    "--image_size": Flag("--data.image_size", _integer(1), "N", "height and width of the images, in pixels"),
    "--val_size": Flag("--data.val_size", _integer(0), "N", "training images held out for validation"),
    "--seed": Flag("--seed_everything", _integer(0), "N", "seed of everything drawn at random"),
    "--patience": Flag("--patience", _integer(1), "N", "stop after N epochs without a better validation accuracy"),
    "--data_dir": Flag("--data.data_dir", _text, "DIR", "folder of the data set (default: data)"),
    "--log_dir": Flag("--log_dir", _text, "DIR", "folder of the runs (default: logs)"),
    "--ckpt_path": Flag("--ckpt_path", _text, "PATH", "checkpoint to continue or measure; last: the newest run's"),
    "--config": Flag("", _text, "FILE", "YAML file laid over the recipe"),
    "--compile": Flag("--model.compile=true", None, "", "compile the network with torch.compile"),
    "--print_model": Flag("", None, "", "show the network's stages, shapes and cost, and stop"),
    "--trust_checkpoint": Flag("", None, "", "let a checkpoint name classes from outside this project"),
    "--print_config": Flag("--print_config", None, "", "show the resolved configuration, and stop"),
}
# LightningCLI's own flags, passed through and checked there.
LONG_GROUPS = ("--trainer", "--model", "--data", "--checkpoint")
LONG_FLAGS = ("--seed_everything", "--verbose", "--weights_only", "--return_predictions")
# The network's image size always follows the data's; see cli.py.
LINKED = {"--model.net.image_size": "--image_size", "--model.net.init_args.image_size": "--image_size"}


@dataclass
class Command:
    """A checked command line, ready for LightningCLI.

    Attributes:
        subcommand: fit, validate, test or predict.
        then_test: Whether testing follows fit (no subcommand was given).
        recipe: Name of the recipe, which is also the folder of its runs; None where a checkpoint decides.
        configs: YAML files, the recipe first; later ones win.
        overrides: Long flags, which win over the files.
        outer_configs: YAML files sectioned by subcommand, as LightningCLI takes them before the subcommand.
        ckpt_path: Checkpoint to start from.
        log_dir: Folder of the runs.
        print_model: Only show the network.
        trust_checkpoint: Let the checkpoint name any class.
    """

    subcommand: str = "fit"
    then_test: bool = True
    recipe: str | None = None
    configs: list[Path] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    outer_configs: list[Path] = field(default_factory=list)
    ckpt_path: str | None = None
    log_dir: str = "logs"
    print_model: bool = False
    trust_checkpoint: bool = False


def recipes() -> dict[str, Path]:
    """Name to file of every recipe in configs/, sub-folders included."""
    folder = PROJECT / "configs"
    return {str(path.relative_to(folder).with_suffix("").as_posix()): path for path in sorted(folder.rglob("*.yaml"))}


def help_text() -> str:
    """The screen that `--help` shows."""
    lines = ["usage: python train.py [fit|validate|test|predict] --model RECIPE [flags]", ""]
    lines += ["Trains a classic CNN on Fashion-MNIST, then tests it. With a subcommand it does only that.", ""]
    lines += [f"  {f'{name} {flag.metavar}':<20} {flag.help}" for name, flag in FLAGS.items()]
    lines += ["", "recipes:"]
    names = recipes()
    for folder in sorted({name.rpartition("/")[0] for name in names}):
        inside = [name for name in names if name.rpartition("/")[0] == folder]
        lines += textwrap.wrap(
            " ".join(inside), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
    lines += ["", "Every other setting (--trainer.*, --model.*, --data.*): python train.py fit --help"]
    return "\n".join(lines)


def parse_command_line(arguments: list[str]) -> Command | None:
    """Check and translate the arguments of train.py.

    Returns:
        The command, or None if help was asked for.

    Raises:
        UserError: For any mistake that can be seen without importing torch.
    """
    command = Command()
    tokens = list(arguments)
    position = 0
    help_wanted = False
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if not token.startswith("-"):
            if token not in SUBCOMMANDS:
                raise UserError(_unexpected_word(token))
            if not command.then_test:
                raise UserError(f"two subcommands, {command.subcommand} and {token}; give one")
            command.subcommand, command.then_test = token, False
            continue
        name, has_value, value = token.partition("=")
        if name in ("-h", "--help"):
            help_wanted = True
            continue
        if name in LINKED:
            raise UserError(f"{name} always follows the size of the images; set {LINKED[name]} instead")
        flag = FLAGS.get(name)
        if flag is None:
            _known_long_flag(name)
            command.overrides.append(token)
            if not has_value and position < len(tokens) and _is_value(tokens[position]):
                command.overrides.append(tokens[position])
                position += 1
            continue
        if flag.check is None:
            if has_value:
                raise UserError(f"{name} takes no value, got {value!r}")
            if flag.target:
                command.overrides.append(flag.target)
            else:
                setattr(command, name.lstrip("-"), True)
            continue
        if not has_value:
            if position == len(tokens) or not _is_value(tokens[position]):
                raise UserError(f"{name} needs a value: {name} {flag.metavar} ({flag.help})")
            value = tokens[position]
            position += 1
        try:
            value = flag.check(value)
        except ValueError as expected:
            raise UserError(f"{name} must be {expected}, got {value!r}") from None
        _apply(command, name, flag, value)

    if help_wanted:
        if command.then_test:
            return None
        command.overrides.append("--help")
        return command
    _check_configs(command)
    if command.ckpt_path == "last":
        command.ckpt_path = str(_newest_checkpoint(command))
    return command


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, duplicate keys refused.

    Raises:
        UserError: If the file is missing, is not YAML, is not a mapping or names a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a YAML file was expected") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as a YAML file: {error}") from None
    try:
        content = yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no settings; a mapping with model, data and trainer was expected")
    return content


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


class _UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML in which a key may stand only once in a mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    line = key_node.start_mark.line + 1
                    raise yaml.YAMLError(f"the key {key_node.value!r} stands twice, the second time in line {line}")
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _apply(command: Command, name: str, flag: Flag, value: str) -> None:
    if name == "--model":
        if command.recipe is not None:
            raise UserError(f"two recipes, {command.recipe} and {value}; give --model once")
        path = _recipe_path(value)
        command.recipe = value if path == recipes().get(value) else path.stem
        command.configs.insert(0, path)
    elif name == "--config":
        path = Path(value)
        sectioned = bool(set(load_yaml(path)) & set(SUBCOMMANDS))
        (command.outer_configs if sectioned else command.configs).append(path)
    elif name == "--ckpt_path":
        command.ckpt_path = value
    else:
        if name == "--log_dir":
            command.log_dir = value
        command.overrides.append(f"{flag.target}={value}")


def _recipe_path(value: str) -> Path:
    known = recipes()
    if value in known:
        return known[value]
    if value.endswith((".yaml", ".yml")) or os.sep in value:
        path = Path(value)
        if path.is_file():
            return path
        raise UserError(f"the recipe file {value} does not exist{did_you_mean(path.stem, known)}")
    hint = did_you_mean(value, known) or f"; the recipes are: {', '.join(name for name in known if '/' not in name)}"
    raise UserError(f"unknown recipe {value!r}{hint}")


def _check_configs(command: Command) -> None:
    names_a_net = any(token.startswith("--model.net") for token in command.overrides)
    from_checkpoint = command.ckpt_path not in (None, "last")
    if not command.configs and not command.outer_configs and not names_a_net and not from_checkpoint:
        needed = "--model RECIPE" if command.subcommand == "fit" else "--ckpt_path PATH"
        raise UserError(f"nothing to {command.subcommand}: give {needed} (python train.py --help lists the recipes)")
    for path in command.configs:
        load_yaml(path)
    if command.recipe is None and command.configs:
        by_path = {path.resolve(): name for name, path in recipes().items()}
        command.recipe = by_path.get(command.configs[0].resolve(), command.configs[0].stem)


def _newest_checkpoint(command: Command) -> Path:
    if command.recipe is None:
        raise UserError("--ckpt_path last needs to know the recipe: add --model RECIPE")
    runs = Path(command.log_dir) / command.recipe
    found = runs.glob("version_*/checkpoints/last.ckpt")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(
            f"there is no run of {command.recipe} to continue in {runs}; leave out --ckpt_path to start one"
        )
    return newest


def _known_long_flag(name: str) -> None:
    group = name.partition(".")[0]
    if name in LONG_FLAGS or group in LONG_GROUPS:
        return
    raise UserError(f"unknown flag {name}{did_you_mean(name, (*FLAGS, *LONG_FLAGS))} (python train.py --help)")


def _unexpected_word(word: str) -> str:
    if word in recipes():
        return f"unexpected {word!r}; did you mean --model {word}?"
    return f"unknown subcommand {word!r}{did_you_mean(word, SUBCOMMANDS)} (one of {', '.join(SUBCOMMANDS)})"


def _is_value(token: str) -> bool:
    return not token.startswith("--")
