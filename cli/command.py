"""The command line of `train.py`, translated into LightningCLI's long form.

Imports nothing heavy: `--help` and plain mistakes are answered from here.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cli.flags import (
    DATA_SETS,
    FLAGS,
    FULL_NAMES,
    LINKED,
    LONG_FLAGS,
    LONG_GROUPS,
    PREDICT_FLAGS,
    SUBCOMMANDS,
    Flag,
    is_value,
    refuse_pasted_dashes,
)
from cli.recipes import did_you_mean, is_recipe, load_yaml, recipe_path, recipes
from errors import UserError, expanded, is_first_process

FALLBACKS = 9  # damaged checkpoints passed over by `last`; Windows has 32 KiB for what is left there
LAST = "CLASSIC_CNNS_LAST"  # where the first process leaves what `last` was, for the processes that it starts


@dataclass
class Command:
    """A checked command line, ready for LightningCLI.

    Attributes:
        subcommand: fit, validate, test or predict.
        then_test: Whether testing follows fit (no subcommand was given).
        recipe: Name of the recipe, which is also the folder of its runs; None where a checkpoint decides.
        configs: YAML files, the recipe first; later ones win.
        overrides: Long flags, which win over the files.
        outer_configs: YAML files with a section for each subcommand.
        files: Both, the recipe first, then in the order given; later ones win.
        ckpt_path: Checkpoint to start from.
        fallbacks: Older checkpoints to start from if that one is damaged, newest first.
        arguments: The command line as it was given.
        fashion_mnist: Whether that data set was asked for by name.
        find_batch_size: Take the largest batch that fits into memory.
        find_lr: Find the learning rate by trial.
        log_dir: Folder of the runs.
        print_model: Only show the network.
        trust_checkpoint: Let the checkpoint name any class.
        images: Pictures, and folders of them, to classify instead of the test images.
        invert: Whether to negate them: auto, always or never.
        output: Files to write their classes to.
        sort: Their order in table and files.
        gradcam: Write heat maps of them, or of the mistakes among the test images.
    """

    subcommand: str = "fit"
    then_test: bool = True
    recipe: str | None = None
    configs: list[Path] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    outer_configs: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    ckpt_path: str | None = None
    fallbacks: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    fashion_mnist: bool = False
    find_batch_size: bool = False
    find_lr: bool = False
    log_dir: str = "logs"
    print_model: bool = False
    trust_checkpoint: bool = False
    images: list[Path] = field(default_factory=list)
    invert: Literal["auto", "always", "never"] = "auto"
    output: list[Path] = field(default_factory=list)
    sort: Literal["given", "unsure"] = "given"
    gradcam: bool = False

    def given(self) -> dict[str, str]:
        """Each setting that the user made, flags first, and the file that holds it ("" for a flag)."""
        given = {token.lstrip("-").partition("=")[0]: "" for token in self.overrides if token.startswith("--")}
        for path in reversed(self.files):  # a later file wins
            for name in _dotted(load_yaml(path)):
                given.setdefault(name.removeprefix(f"{self.subcommand}."), str(path))
        return given

    def asked_for(self, name: str) -> bool:
        """Whether the user made a setting, by a flag or in a file beside the recipe."""
        file = self.given().get(name)
        return file is not None and not (file and (Path(file) == self.with_net or is_recipe(file)))

    def decided(self) -> set[str]:
        """The settings that hold for other pictures too: not what this project's recipes say for Fashion-MNIST."""
        given = self.given()
        source = given.get("data.folder"), given.get("data.dataset")  # the file that names the pictures; "" is a flag
        return {name for name, file in given.items() if not file or not is_recipe(file) or file in source}

    @cached_property
    def with_net(self) -> Path | None:
        """The first file that names a network: the recipe. (Once the command line is read.)"""
        for path in self.files:
            content = load_yaml(path)
            settings = content.get(self.subcommand) if path in self.outer_configs else content
            model = settings.get("model") if isinstance(settings, dict) else None
            net = model.get("net") if isinstance(model, dict) else None
            if isinstance(net, str) or (isinstance(net, dict) and "class_path" in net):
                return path
        return None

    @property
    def changes_net(self) -> bool:
        """Whether a flag names a network, or sets something of one."""
        return any(token.startswith("--model.net") for token in self.overrides)

    @property
    def names_a_net(self) -> bool:
        """Whether the command line names the network; else the checkpoint does, and flags only change its settings."""
        by_flag = any(re.match(r"--model\.net(\.class_path)?(=|$)", token) for token in self.overrides)
        return bool(self.configs) and (by_flag or self.with_net is not None)


def parse_command_line(arguments: list[str]) -> Command | None:
    """Check and translate the arguments of train.py.

    Returns:
        The command, or None if help was asked for.

    Raises:
        UserError: For any mistake that can be seen without importing torch.
    """
    refuse_pasted_dashes(arguments)
    command, tokens = Command(arguments=list(arguments)), list(arguments)
    help_wanted = False
    while tokens:
        token = tokens.pop(0)
        name, has_value, value = token.partition("=")
        if not token.startswith("-"):
            _take_subcommand(command, token)
        elif name in ("-h", "--help"):
            help_wanted = True
        elif flag := FLAGS.get(name) or PREDICT_FLAGS.get(name):
            _take_flag(command, name, flag, value if has_value else None, tokens)
        else:
            _check_long_flag(name)
            command.overrides.append(token)
            if not has_value and tokens and is_value(tokens[0]):
                command.overrides.append(tokens.pop(0))
    if help_wanted:
        if command.then_test or command.subcommand == "predict":
            return None
        command.overrides.append("--help")
        command.ckpt_path = None  # which need not be there
        return command
    _check_predict_flags(command)
    _check_configs(command)
    _check_auto(command)
    if command.ckpt_path == "last":
        if is_first_process() or LAST not in os.environ:
            os.environ[LAST] = json.dumps(_newest_checkpoints(command))
        command.ckpt_path, *command.fallbacks = json.loads(os.environ[LAST])
    return command


def _take_subcommand(command: Command, word: str) -> None:
    if word not in SUBCOMMANDS:
        if word in recipes():
            raise UserError(f"unexpected {word!r}; did you mean --model {word}?")
        hint = did_you_mean(word, SUBCOMMANDS)
        raise UserError(f"unknown subcommand {word!r}{hint} (one of {', '.join(SUBCOMMANDS)})")
    if not command.then_test:
        raise UserError(f"two subcommands, {command.subcommand} and {word}; give one")
    command.subcommand, command.then_test = word, False


def _take_flag(command: Command, name: str, flag: Flag, value: str | None, tokens: list[str]) -> None:
    """Put a flag into the command; its values come from the front of the tokens unless one was given with `=`."""
    if flag.check is None:
        if value is None and tokens and flag.takes(tokens[0]):
            value = tokens.pop(0)
        if value and flag.takes(value):
            command.overrides.append(f"{flag.target.partition('=')[0]}={value.lower()}")
            return
        if value is not None:
            may = "nothing, true or false" if flag.target.endswith("=true") else "no value"
            raise UserError(f"{name} takes {may}, got {value!r}")
        if flag.target:
            command.overrides.append(flag.target)
        else:
            setattr(command, name.lstrip("-"), True)
        return
    if value is None:
        if not tokens or not is_value(tokens[0]):
            raise UserError(f"{name} needs a value: {name} {flag.metavar} ({flag.help})")
        value = tokens.pop(0)
    values = [value]
    while flag.metavar.endswith("...") and tokens and is_value(tokens[0]):
        values.append(tokens.pop(0))
    for value in values:
        try:
            value = flag.check(value)
        except ValueError as expected:
            raise UserError(f"{name} must be {expected}, got {value!r}") from None
        _apply(command, name, flag, value)


def _apply(command: Command, name: str, flag: Flag, value: str) -> None:
    if name == "--model":
        if command.recipe is not None:
            raise UserError(f"two recipes, {command.recipe} and {value}; give --model once")
        path = recipe_path(value)
        command.recipe = _recipe_name(path)
        command.configs.insert(0, path)
        command.files.insert(0, path)
    elif name == "--config":
        path = Path(value)
        content = load_yaml(path)
        sectioned = bool(content.keys() & SUBCOMMANDS.keys())
        if sectioned and (beside := content.keys() - SUBCOMMANDS.keys()):
            section = next(name for name in SUBCOMMANDS if name in content)
            raise UserError(
                f"{path}: {sorted(beside, key=str)[0]} stands beside the section {section}; put it into a section"
            )
        (command.outer_configs if sectioned else command.configs).append(path)
        command.files.append(path)
    elif name == "--data":
        named = ("--data.folder=", "--data.dataset=")  # by an earlier --data
        command.overrides = [token for token in command.overrides if not token.startswith(named)]
        command.fashion_mnist = value == "fashion_mnist"
        command.overrides += [] if command.fashion_mnist else _data(value)
    elif name == "--ckpt_path":
        command.ckpt_path = value
    elif name == "--batch_size" and value == "auto":
        command.find_batch_size = True
    elif name == "--lr" and value == "auto":
        command.find_lr = True
    elif name in ("--images", "--output"):
        getattr(command, name.lstrip("-")).append(Path(value))
    elif name in ("--invert", "--sort"):
        setattr(command, name.lstrip("-"), value)  # checked
    else:
        if name == "--log_dir":
            command.log_dir = value
        elif name == "--batch_size":  # the last one counts
            command.find_batch_size = False
        elif name == "--lr":
            command.find_lr = False
        command.overrides.append(f"{flag.target}={value}")


def _recipe_name(path: Path) -> str:
    by_path = {known.resolve(): name for name, known in recipes().items()}
    return by_path.get(path.resolve(), path.stem)


def _data(value: str) -> list[str]:
    """The settings that `--data` stands for: a folder, a data set's name, or the path of a class."""
    folder = Path(expanded(value))
    if folder.is_dir() and value not in DATA_SETS:  # torchvision makes folders of such names; ./NAME is one
        whole = Path(os.path.normpath(folder.absolute()))  # one name for one folder, unless a link leads elsewhere
        same = whole.exists() and whole.samefile(folder)
        return [f"--data.folder={whole if same else folder.absolute()}", "--data.dataset="]
    if value in DATA_SETS or re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
        return ["--data.folder=", f"--data.dataset={value}"]
    raise UserError(
        f"--data {value}: there is no such folder, nor a data set of that name{did_you_mean(value, DATA_SETS)}; give a "
        f"folder with a sub-folder of pictures for each class, or one of {', '.join(DATA_SETS)}"
    )


def _check_long_flag(name: str) -> None:
    if name in LINKED:
        raise UserError(f"{name} always follows the size of the images; set {LINKED[name]} instead")
    if name not in LONG_FLAGS and name.partition(".")[0] not in LONG_GROUPS:
        if full := FULL_NAMES.get(name.lstrip("-")):
            raise UserError(f"unknown flag {name}; did you mean {full}? (python train.py --help)")
        raise UserError(f"unknown flag {name}{did_you_mean(name, (*FLAGS, *LONG_FLAGS))} (python train.py --help)")


def _check_predict_flags(command: Command) -> None:
    given = [name for name in PREDICT_FLAGS if any(token.partition("=")[0] == name for token in command.arguments)]
    if given and command.subcommand != "predict":
        raise UserError(f"{given[0]} belongs to predict: python train.py predict --ckpt_path PATH --images PATH...")
    alone = [name for name in given if name != "--gradcam"]  # works with the test images too
    if alone and not command.images:
        raise UserError(f"{alone[0]} needs pictures: add --images PATH...")


def _check_configs(command: Command) -> None:
    given = {token.partition("=")[0] for token in command.arguments}
    for path in command.files:
        content: Any = load_yaml(path)
        content = content.get(command.subcommand) if path in command.outer_configs else content
        if not isinstance(content, dict):
            continue
        if "ckpt_path" in content and "--ckpt_path" not in given:
            command.ckpt_path = content["ckpt_path"] and expanded(str(content["ckpt_path"]))
        if content.get("log_dir") and "--log_dir" not in given:
            command.log_dir = expanded(str(content["log_dir"]))
    from_checkpoint = command.ckpt_path not in (None, "last")
    named = command.configs or command.outer_configs or command.changes_net or from_checkpoint
    if command.subcommand == "fit" and not named:
        raise UserError("nothing to fit: give --model RECIPE (python train.py --help lists the recipes)")
    if command.subcommand != "fit" and command.ckpt_path is None:
        raise UserError(
            f"nothing to {command.subcommand}: a network needs trained weights; give --ckpt_path PATH (or last), "
            "for instance weights/lenet.ckpt"
        )
    if command.recipe is None and command.configs and (command.names_a_net or not from_checkpoint):
        command.recipe = _recipe_name(command.configs[0])


def _check_auto(command: Command) -> None:
    for found, given, what in (
        (command.find_batch_size, "--batch_size", "batch size"),
        (command.find_lr, "--lr", "learning rate"),
    ):
        if found and (command.ckpt_path or command.subcommand != "fit"):
            raise UserError(f"{given} auto is for new runs: a checkpoint keeps its {what}")
        if found and any(token.startswith("--print_config") for token in command.overrides):
            raise UserError(f"{given} auto is found when training starts, too late for --print_config; give a number")


def _newest_checkpoints(command: Command) -> list[str]:
    if command.recipe is None and not command.files and not command.changes_net:
        raise UserError("--ckpt_path last needs to know the recipe: add --model RECIPE, or give the checkpoint's path")
    runs = Path(command.log_dir) / (command.recipe or "unnamed")
    found = sorted(runs.glob("version_*/checkpoints/*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.stem))
    if not found:
        raise UserError(f"there is no run of {runs.name} to continue in {runs}; leave out --ckpt_path to start one")
    return [str(path) for path in found[::-1][: 1 + FALLBACKS]]


def _dotted(mapping: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
