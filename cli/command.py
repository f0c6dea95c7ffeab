"""The short flags and recipe names of `train.py`, translated into LightningCLI's long form.

Imports nothing heavy: `--help` and plain mistakes are answered from here.
"""

import difflib
import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from errors import UserError, printed_error

PROJECT = Path(__file__).resolve().parents[1]
SUBCOMMANDS = {
    "fit": "train only",
    "validate": "measure a checkpoint on the validation images",
    "test": "measure a checkpoint on the 10,000 test images",
    "predict": "class probabilities of the test images as CSV, or of --images",
}


def _integer(least: int, most: float = math.inf) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(r"[+-]?\d+", text) or not least <= int(text) <= most:
            raise ValueError(f"an integer {f'of at least {least}' if most == math.inf else f'from {least} to {most}'}")
        return text

    return check


def _one_of(*names: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return check


_accelerator = _one_of("auto", "cpu", "gpu", "cuda", "mps", "tpu")
_precision = _one_of("32", "bf16", "16", "64", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")


def _devices(text: str) -> str:
    if not re.fullmatch(r"auto|-1|[1-9]\d*|\d+(,\d+)*,?", text) or text == "0":
        raise ValueError("a number of at least 1, the devices' numbers like 0,1, or auto")
    return text


def _positive_number(text: str) -> str:
    try:
        valid = 0 < float(text) < math.inf
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("a positive number")
    return text


def _batch_size(text: str) -> str:
    return text if text == "auto" else _integer(1)(text)


def _learning_rate(text: str) -> str:
    return text if text == "auto" else _positive_number(text)


def _epochs(text: str) -> str:
    return text if text == "-1" else _integer(1)(text)


def _text(text: str) -> str:
    if not text:
        raise ValueError("a value")
    return text


def _output(text: str) -> str:
    if not text.endswith((".csv", ".json", ".png")):
        raise ValueError("a file name that ends in .csv, .json or .png")
    return text


class Flag(NamedTuple):
    """One short flag: what it stands for, how its value is checked (None: it takes none), its line in `--help`."""

    target: str
    check: Callable[[str], str] | None
    metavar: str
    help: str


FLAGS = {
    "--model": Flag("", _text, "RECIPE", "recipe to train (list below), or a path to a YAML file"),
    "--accelerator": Flag("--trainer.accelerator", _accelerator, "NAME", "cpu, gpu, mps or auto (default: auto)"),
    "--devices": Flag("--trainer.devices", _devices, "N", "number of devices or processes, or auto"),
    "--num_nodes": Flag("--trainer.num_nodes", _integer(1), "N", "number of machines"),
    "--precision": Flag("--trainer.precision", _precision, "P", "32, bf16-mixed, 16-mixed, ... (GPUs: bf16-mixed)"),
    "--max_epochs": Flag("--trainer.max_epochs", _epochs, "N", "passes over the training images"),
    "--batch_size": Flag("--data.batch_size", _batch_size, "N", "training images a step, on each device, or auto"),
    "--lr": Flag(
        "--model.optimizer.init_args.lr",
        _learning_rate,
        "X",
        "learning rate, or auto: found by trial, then trained with",
    ),
    "--image_size": Flag("--data.image_size", _integer(1), "N", "height and width of the images, in pixels"),
    "--val_size": Flag("--data.val_size", _integer(0), "N", "training images held out for validation"),
    "--seed": Flag("--seed_everything", _integer(0, 2**32 - 1), "N", "seed of everything drawn at random"),
    "--patience": Flag("--patience", _integer(1), "N", "stop after N epochs without a better validation accuracy"),
    "--data_dir": Flag("--data.data_dir", _text, "DIR", "folder of the data set (default: data)"),
    "--log_dir": Flag("--log_dir", _text, "DIR", "folder of the runs (default: logs)"),
    "--ckpt_path": Flag("--ckpt_path", _text, "PATH", "checkpoint to continue or measure; last: the newest run's"),
    "--config": Flag("", _text, "FILE", "YAML file laid over the recipe"),
    "--histograms": Flag("--histograms=true", None, "", "histograms of weights and gradients in TensorBoard; slower"),
    "--stop_at_chance": Flag("--stop_at_chance=true", None, "", "stop a network that learns nothing in 500 batches"),
    "--pretrained": Flag("--pretrained=true", None, "", "start VGG from ImageNet's weights; see pretrained/vgg16"),
    "--compile": Flag("--model.compile=true", None, "", "compile the network with torch.compile"),
    "--print_model": Flag("", None, "", "show the network's stages, shapes and cost, and stop"),
    "--trust_checkpoint": Flag("", None, "", "let a checkpoint name classes from outside this project"),
    "--print_config": Flag("--print_config", None, "", "show the resolved configuration, and stop"),
}
# Those of `predict` alone. The first and the third take several values.
PREDICT_FLAGS = {
    "--images": Flag("", _text, "PATH...", "classify these pictures, and those in these folders, not the test images"),
    "--invert": Flag(
        "",
        _one_of("auto", "always", "never"),
        "WHEN",
        "make dark on light light on dark: auto (default), always or never",
    ),
    "--output": Flag(
        "", _output, "FILE...", "files to write: .csv, .json, .png (contact sheet; default: pictures.png)"
    ),
    "--gradcam": Flag(
        "", None, "", "write heat maps (Grad-CAM) of each picture; without --images of the worst mistakes"
    ),
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
        fallbacks: Older checkpoints to start from if that one is damaged, newest first.
        arguments: The command line as it was given.
        find_batch_size: Take the largest batch that fits into memory.
        find_lr: Find the learning rate by trial.
        log_dir: Folder of the runs.
        print_model: Only show the network.
        trust_checkpoint: Let the checkpoint name any class.
        images: Pictures, and folders of them, to classify instead of the test images.
        invert: Whether to negate them: auto, always or never.
        output: Files for their classes.
        gradcam: Write heat maps of them, or of the mistakes among the test images.
    """

    subcommand: str = "fit"
    then_test: bool = True
    recipe: str | None = None
    configs: list[Path] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    outer_configs: list[Path] = field(default_factory=list)
    ckpt_path: str | None = None
    fallbacks: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    find_batch_size: bool = False
    find_lr: bool = False
    log_dir: str = "logs"
    print_model: bool = False
    trust_checkpoint: bool = False
    images: list[Path] = field(default_factory=list)
    invert: Literal["auto", "always", "never"] = "auto"
    output: list[Path] = field(default_factory=list)
    gradcam: bool = False


def recipes() -> dict[str, Path]:
    """Name to file of every recipe in configs/, sub-folders included."""
    folder = PROJECT / "configs"
    return {str(path.relative_to(folder).with_suffix("").as_posix()): path for path in sorted(folder.rglob("*.yaml"))}


def help_text(predict: bool = False) -> str:
    """The screen that `--help` shows, or that of `predict --help`."""
    if predict:
        shared = ("--ckpt_path", "--trust_checkpoint", "--accelerator", "--devices", "--precision", "--data_dir")
        flags = PREDICT_FLAGS | {name: FLAGS[name] for name in shared}
        lines = ["usage: python train.py predict --ckpt_path PATH [--images PATH...] [flags]", ""]
        lines += ["Writes the class probabilities of the test images, or shows the classes of your own pictures.", ""]
        lines += [f"  {f'{name} {flag.metavar}':<20} {flag.help}" for name, flag in flags.items()]
        return "\n".join([*lines, "", "All other flags: python train.py --help and python train.py fit --help"])
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
    lines += ["", "Your own pictures (--images PATH...): python train.py predict --help"]
    lines += ["Every other setting (--trainer.*, --model.*, --data.*): python train.py fit --help"]
    return "\n".join(lines)


def parse_command_line(arguments: list[str]) -> Command | None:
    """Check and translate the arguments of train.py.

    Returns:
        The command, or None if help was asked for.

    Raises:
        UserError: For any mistake that can be seen without importing torch.
    """
    command = Command(arguments=list(arguments))
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
        flag = FLAGS.get(name) or PREDICT_FLAGS.get(name)
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
        values = [value]
        if not has_value:
            if position == len(tokens) or not _is_value(tokens[position]):
                raise UserError(f"{name} needs a value: {name} {flag.metavar} ({flag.help})")
            values = [tokens[position]]
            position += 1
        while flag.metavar.endswith("...") and position < len(tokens) and _is_value(tokens[position]):
            values.append(tokens[position])
            position += 1
        for value in values:
            try:
                value = flag.check(value)
            except ValueError as expected:
                raise UserError(f"{name} must be {expected}, got {value!r}") from None
            _apply(command, name, flag, value)

    if help_wanted:
        if command.then_test or command.subcommand == "predict":
            return None
        command.overrides.append("--help")
        return command
    _check_predict_flags(command, tokens)
    _check_configs(command)
    for found, given, what in (
        (command.find_batch_size, "--batch_size", "batch size"),
        (command.find_lr, "--lr", "learning rate"),
    ):
        if found and (command.ckpt_path or command.subcommand != "fit"):
            raise UserError(f"{given} auto is for new runs: a checkpoint keeps its {what}")
        if found and any(token.startswith("--print_config") for token in command.overrides):
            raise UserError(f"{given} auto is found when training starts, too late for --print_config; give a number")
    if command.ckpt_path == "last":
        command.ckpt_path, *command.fallbacks = _newest_checkpoints(command)
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


def take_values(tokens: list[str]) -> list[str]:
    """The words up to the next flag, taken from the front of the tokens."""
    values = []
    while tokens and not tokens[0].startswith("--"):
        values.append(tokens.pop(0))
    return values


def take_flag(token: str, tokens: list[str], refused: Mapping[str, str]) -> list[str]:
    """A flag that another command passes on to train.py, with its value, which is taken from the front of the tokens.

    Raises:
        UserError: If it is one of the refused flags, each given with the reason.
    """
    name, has_value, _ = token.partition("=")
    if name in refused:
        raise UserError(f"{name} can't be given here: {refused[name]}")
    takes_value = name not in FLAGS or FLAGS[name].check is not None
    if takes_value and not has_value and tokens and not tokens[0].startswith("--"):
        return [token, tokens.pop(0)]
    return [token]


def resolved(recipe: str, flags: Iterable[str]) -> dict[str, Any]:
    """The configuration that train.py, in a process of its own, makes of a recipe and flags.

    Raises:
        UserError: If it is not valid.
    """
    command = [sys.executable, str(PROJECT / "train.py"), "fit", "--model", recipe, *flags, "--print_config"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(printed_error(result.stderr) or f"exit code {result.returncode}")
    return yaml.safe_load(result.stdout)


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
    elif name == "--batch_size" and value == "auto":
        command.find_batch_size = True
    elif name == "--lr" and value == "auto":
        command.find_lr = True
    elif name in ("--images", "--output"):
        getattr(command, name.lstrip("-")).append(Path(value))
    elif name == "--invert":
        command.invert = value  # type: ignore[assignment]  # checked
    else:
        if name == "--log_dir":
            command.log_dir = value
        elif name == "--batch_size":  # the last one counts
            command.find_batch_size = False
        elif name == "--lr":
            command.find_lr = False
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


def _check_predict_flags(command: Command, tokens: list[str]) -> None:
    given = [name for name in PREDICT_FLAGS if any(token.partition("=")[0] == name for token in tokens)]
    if given and command.subcommand != "predict":
        raise UserError(f"{given[0]} belongs to predict: python train.py predict --ckpt_path PATH --images PATH...")
    alone = [name for name in given if name != "--gradcam"]  # which the test images do for as well
    if alone and not command.images:
        raise UserError(f"{alone[0]} needs pictures: add --images PATH...")


def _check_configs(command: Command) -> None:
    names_a_net = any(token.startswith("--model.net") for token in command.overrides)
    from_checkpoint = command.ckpt_path not in (None, "last")
    named = command.configs or command.outer_configs or names_a_net or from_checkpoint
    if command.subcommand == "fit" and not named:
        raise UserError("nothing to fit: give --model RECIPE (python train.py --help lists the recipes)")
    if command.subcommand != "fit" and command.ckpt_path is None and not command.outer_configs:
        raise UserError(
            f"nothing to {command.subcommand}: a network needs trained weights; give --ckpt_path PATH (or last), "
            "for instance weights/lenet.ckpt"
        )
    for path in command.configs:
        load_yaml(path)
    if command.recipe is None and command.configs:
        by_path = {path.resolve(): name for name, path in recipes().items()}
        command.recipe = by_path.get(command.configs[0].resolve(), command.configs[0].stem)


def _newest_checkpoints(command: Command) -> list[str]:
    if command.recipe is None:
        raise UserError("--ckpt_path last needs to know the recipe: add --model RECIPE")
    runs = Path(command.log_dir) / command.recipe
    found = sorted(runs.glob("version_*/checkpoints/*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.stem))
    if not found:
        raise UserError(
            f"there is no run of {command.recipe} to continue in {runs}; leave out --ckpt_path to start one"
        )
    return [str(path) for path in reversed(found)]


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
