"""Where a run starts: from scratch, or from a checkpoint, whose settings it then takes over."""

import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from callbacks.run_folder import SLURM_JOB
from checkpoints.plain import OF_PICTURES, read_settings, recipe_name
from checkpoints.reading import read_checkpoint
from checkpoints.trust import Trusted
from cli.command import Command
from cli.recipes import load_yaml
from datamodules import PicturesDataModule
from datamodules.files.finding import whole_below
from errors import UserError, is_first_process, print_warning, shown, typed
from launch.launchers import INTERACTIVE
from runs.settings import SEEN


@dataclass
class Start:
    """What a checkpoint says about the run that continues from it; empty without one.

    Attributes:
        command: The checked command line.
        recipe: Name of the recipe.
        settings: The configuration that the checkpoint was made with.
        shapes: Name and shape of its tensors.
        processes: How many processes trained it; None in checkpoints of earlier versions.
        pictures: What is known of the pictures it was trained on, if they are not Fashion-MNIST's.
        seen: For test and predict with a recipe: the checkpoint's settings of the images, which win over the recipe's.
    """

    command: Command
    recipe: str = "unnamed"
    settings: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    processes: int | None = None
    pictures: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, command: Command) -> "Start":
        """Read the checkpoint, if the command names one.

        Raises:
            UserError: If it can't be used.
        """
        given = command.given() if command.fashion_mnist else {}
        for name in {"data.folder", "data.dataset"} & given.keys():
            file = given[name] or f"--{name}"
            raise UserError(f"--data fashion_mnist can't go with {file}, which names other pictures")
        requeued = _requeued(command)
        if not command.ckpt_path:
            return cls(command, command.recipe or "unnamed")
        checkpoint = _newest_valid(command)
        path = str(command.ckpt_path)
        if command.subcommand == "fit" and "optimizer_states" not in checkpoint:
            raise UserError(
                f"{path} holds weights alone, without the optimiser's state: training can't continue from it"
            )
        settings: dict[str, Any] = {}
        if "config" in checkpoint or not command.names_a_net:
            settings = read_settings(checkpoint.get("config"), path)
        if settings:
            _check_pictures("class_names" in settings["data"], command)
        seen: dict[str, Any] = {}
        rules = Trusted(path, command.trust_checkpoint, "add --trust_checkpoint", checkpoint["state_dict"], whole_below)
        if settings and not command.names_a_net:  # which say what to build
            if "trainer.devices" in command.given():  # then those of the file don't matter
                (settings.get("trainer") or {}).pop("devices", None)
            settings = rules.to_train(settings) if command.subcommand == "fit" else rules.to_use(settings)
        elif settings and command.subcommand != "fit":
            stored = settings["data"]
            wanted = {*SEEN, *(OF_PICTURES if "class_names" in stored else ())}
            stored = rules.data({name: value for name, value in stored.items() if name in wanted})
            seen = {name: value for name, value in stored.items() if name in SEEN}
        if requeued:
            _keep_what_was_found(command, checkpoint, path)
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        processes = checkpoint.get("processes")
        recipe = command.recipe or recipe_name(checkpoint)
        pictures = checkpoint.get(PicturesDataModule.__qualname__) or {}
        return cls(command, recipe, settings, shapes, processes if type(processes) is int else None, pictures, seen)

    def check_processes(self, number: int) -> None:
        """Refuse to continue with a different number of processes, as each would see other images.

        Raises:
            UserError: If the number differs.
        """
        if self.processes not in (None, number):
            before = "one process" if self.processes == 1 else f"{self.processes} processes"
            raise UserError(
                f"{self.command.ckpt_path} was trained by {before}, not {number}, whose images and steps would be "
                f"others; set --devices (and --num_nodes) so that there are {self.processes}, or start again without "
                "--ckpt_path; train.py test measures it here"
            )

    @property
    def folder(self) -> Path | None:
        """The folder of the run that the checkpoint belongs to, if it lies in one."""
        if not self.command.ckpt_path:
            return None
        parent = Path(self.command.ckpt_path).absolute().parent
        return parent.parent if parent.name == "checkpoints" else None

    @property
    def precision(self) -> str | None:
        """That of the checkpoint's run, in which null is float32; None without a checkpoint's settings."""
        return ((self.settings.get("trainer") or {}).get("precision") or "32-true") if self.settings else None

    def arguments(self) -> list[str]:
        """For LightningCLI: the checkpoint's settings, then the recipe, then the flags; later ones win."""
        command = self.command
        arguments = []
        if self.settings and not command.names_a_net:
            base = {"model": self.settings["model"], "data": self.settings["data"]}
            base["seed_everything"] = self.settings.get("seed_everything", 0)
            base["trainer"] = {"precision": self.precision}
            if command.subcommand == "fit":
                base["trainer"] = self.settings.get("trainer") or {}
                base |= {name: bool(self.settings.get(name)) for name in ("pretrained", "class_weights")}
                patience = self.settings.get("patience")
                base["patience"] = patience if type(patience) is int and patience > 0 else None
            arguments.append(_config(base))
        # Not as paths: the parser would read the files in the locale's encoding.
        for path in command.files:
            content = load_yaml(path)
            settings = content.get(command.subcommand) or {} if path in command.outer_configs else content
            arguments.append(_config(settings))
            if self.seen and path == command.with_net:  # the recipe; the user's further files and flags still win
                arguments.append(_config({"data": self.seen}))
        if command.ckpt_path:
            arguments.append(f"--ckpt_path={command.ckpt_path}")
        if command.images:
            arguments.append("--trainer.precision=32-true")  # the same numbers as in Python, demo.py and exported files
        arguments += ["--weights_only=true", *command.overrides]
        if command.images:
            # A few pictures are worth neither processes nor a bar nor compiling, and LayerCAM hooks into plain modules.
            arguments += ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.enable_progress_bar=false"]
            arguments.append("--model.compile=false")
        return arguments


class _Quoted(str):
    """A text that stays one: jsonargparse takes 1e5 for a number, where PyYAML leaves out the quotes."""


yaml.SafeDumper.add_representer(
    _Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style='"')
)


def _config(settings: dict[str, Any]) -> str:
    data = settings.get("data")
    if isinstance(data, dict) and isinstance(names := data.get("class_names"), list):
        names = [_Quoted(name) if isinstance(name, str) else name for name in names]
        settings = settings | {"data": data | {"class_names": names}}
    return f"--config={yaml.safe_dump(settings)}"


def how_to_continue(command: Command, config: Any, path: Path) -> str:
    """The same command line with the checkpoint in it."""
    arguments = list(command.arguments)
    _remove(arguments, "--ckpt_path")
    if _is_auto(arguments, "--batch_size"):
        _replace(arguments, "--batch_size", config.data.batch_size)
    if _is_auto(arguments, "--lr"):
        _replace(arguments, "--lr", config.model.optimizer.init_args.lr)
    program = ["python", "train.py"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        program = ["torchrun", "...", "train.py"]  # whose own arguments it doesn't tell
    elif "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE:
        program = ["srun", *program]
    return typed([*program, *arguments, "--ckpt_path", shown(path)])


def _requeued(command: Command) -> bool:
    """Whether SLURM starts a job again; it then continues its own run, if that has left a checkpoint."""
    job, log_dir = os.environ.get("SLURM_JOB_ID"), Path(command.log_dir) / (command.recipe or "")
    if command.subcommand != "fit" or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return False
    own = None  # before a checkpoint on the command line, from which it first started
    for marker in log_dir.glob(f"{'' if command.recipe else '**/'}version_*/{SLURM_JOB}"):  # else a checkpoint knows it
        checkpoint = marker.parent / "checkpoints" / "last.ckpt"
        if marker.read_text(encoding="utf-8") == json.dumps([job, command.arguments]) and checkpoint.is_file():
            own = command.ckpt_path = str(checkpoint)
            command.fallbacks = []
    return own is not None


def _keep_what_was_found(command: Command, checkpoint: dict[str, Any], path: str) -> None:
    """Train with the batch size and the learning rate that the job found when it first ran."""
    settings = read_settings(checkpoint.get("config"), path)
    if command.find_batch_size:
        command.overrides.append(f"--data.batch_size={int(settings['data']['batch_size'])}")
    if command.find_lr:
        command.overrides.append(
            f"--model.optimizer.init_args.lr={float(settings['model']['optimizer']['init_args']['lr'])}"
        )
    command.find_batch_size = command.find_lr = False


def _check_pictures(own: bool, command: Command) -> None:
    """Refuse a checkpoint of one data set with another, whose classes are others even where there are as many."""
    given = {"data.folder", "data.dataset"} & command.given().keys()
    if own and command.fashion_mnist:
        raise UserError(f"{command.ckpt_path} was trained on other pictures; leave --data fashion_mnist out")
    if given and not own:
        raise UserError(f"{command.ckpt_path} was trained on Fashion-MNIST; leave --data out, or train on the pictures")
    if own and command.names_a_net and not given and not command.images:
        raise UserError(f"{command.ckpt_path} was trained on other pictures than Fashion-MNIST's; say which: --data")


def _newest_valid(command: Command) -> dict[str, Any]:
    """The checkpoint to start from; with `--ckpt_path last`, an older one if that is damaged."""
    damages = []
    for path in (str(command.ckpt_path), *command.fallbacks):
        try:
            checkpoint = read_checkpoint(Path(path))
        except UserError as error:
            damages.append(error)
            continue
        if damages and is_first_process():
            print_warning(f"{damages[0]}; starting from {path}")
        command.ckpt_path = path
        return checkpoint
    raise damages[0]


def _is_auto(arguments: list[str], flag: str) -> bool:
    return f"{flag}=auto" in arguments or (flag, "auto") in itertools.pairwise(arguments)


def _replace(arguments: list[str], flag: str, value: float) -> None:
    """Replace the flag's value."""
    _remove(arguments, flag)
    arguments.append(f"{flag}={value}")


def _remove(arguments: list[str], flag: str) -> None:
    for position, token in reversed([*enumerate(arguments)]):
        if token.split("=")[0] == flag:
            del arguments[position : position + (1 if "=" in token else 2)]
