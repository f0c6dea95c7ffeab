"""LightningCLI with this project's classes and defaults, and with errors of one line: it parses, checks and builds."""

import inspect
import re
import sys
from argparse import ArgumentError
from enum import Enum
from functools import cached_property
from typing import Any

import yaml
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from callbacks.processes import Processes
from callbacks.run_folder import RunFolder
from cli.command import Command
from cli.flags import FLAGS
from cli.messages import explain
from datamodules import FashionMNISTDataModule, PicturesDataModule, class_of
from errors import UserError, one_line
from inspection.table import table
from launch.checks import (
    check_accumulation,
    check_configuration,
    check_input,
    check_network,
    check_settings,
    check_weights,
    explained,
    named,
    warn_of_interval,
)
from launch.found import Trials
from launch.launchers import check_rank, take_over_processes
from launch.lightning_flags import check_trainer, check_training
from launch.own_pictures import follow_pictures
from launch.start import Start
from launch.trainer import RunCallbacks, precision, validates
from lit_modules import LitClassifier

# Settings of callbacks may be members of an enumeration, which YAML does not know.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
LARGEST_SEED = 2**32 - 1  # the largest that NumPy accepts


class StrictParser(LightningArgumentParser):
    """An argument parser that raises its errors, and accepts no abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise `ArgumentError` instead of printing the usage."""
        raise ArgumentError(None, message) from ex


class SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration beside the run and, as text, in each of its checkpoints.

    Args:
        recipe: Name of the recipe.
        folder: The run's folder.
        kwargs: As for Lightning's `SaveConfigCallback`.
    """

    def __init__(self, *args: Any, recipe: str, folder: RunFolder, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, save_to_log_dir=False)  # type: ignore[misc]
        self.recipe = recipe
        self.folder = folder

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it; called on the first process only."""
        target = self.folder.claim() / self.config_filename
        config = self.config.clone()
        config.ckpt_path = None  # of a continued run: whoever takes its settings trains anew
        # The parser's own `save` would write in the locale's encoding.
        target.write_text(self.parser.dump(config, skip_none=False), encoding="utf-8")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store in the checkpoint how it was trained."""
        checkpoint["recipe"] = self.recipe
        checkpoint["config"] = self._text

    @cached_property
    def _text(self) -> str:
        return self.parser.dump(self.config, skip_none=False, skip_link_targets=False)


class ClassifierCLI(LightningCLI):
    """Builds what one `Command` asks for.

    Args:
        command: The checked command line.
        processes: The callback that watches the run's other processes.

    Attributes:
        start: Where the run starts; to be set before `build`.
    """

    def __init__(self, command: Command, processes: Processes) -> None:
        self.command = command
        self.processes = processes
        self.start = Start(command)

    @property
    def data_class(self) -> type[FashionMNISTDataModule]:
        """The class of the data set that command or checkpoint name."""
        stored = {} if self.command.names_a_net and not self.command.images else self.start.settings.get("data", {})
        return class_of(stored | {name.removeprefix("data."): "" for name in self.command.given()})

    def build(self) -> None:
        """Parse, check, and build network, data module and Trainer.

        Raises:
            UserError: If the configuration is not valid, or contradicts the checkpoint.
        """
        self.callbacks = RunCallbacks(self.start, self.processes)
        super().__init__(
            LitClassifier,
            self.data_class,
            save_config_callback=SaveConfig if self.command.subcommand == "fit" else None,
            save_config_kwargs={"recipe": self.start.recipe, "folder": self.callbacks.folder},
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0, "use_distributed_sampler": False},
            parser_class=StrictParser,
            parser_kwargs={"prog": f"train.py [options] {self.command.subcommand}"},
            args=self.start.arguments(),
            run=False,
            auto_configure_optimizers=False,
        )

    def __deepcopy__(self, memo: dict) -> "ClassifierCLI":
        """Weight averaging copies the model, whose optimiser's factory refers to this object: it is not copied."""
        return self

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The flags that belong to no class."""
        for name, kind, default in (
            ("log_dir", str, "logs"),
            ("patience", PositiveInt | None, None),
            ("histograms", bool, False),
            ("stop_at_chance", bool, False),
            ("class_weights", bool, False),
            ("pretrained", bool, False),
            ("ckpt_path", str | None, None),
        ):
            parser.add_argument(f"--{name}", type=kind, default=default, help=FLAGS[f"--{name}"].help)
        weights_only = "always true here: nothing in a checkpoint is executed"
        parser.add_argument("--weights_only", type=bool | None, default=None, help=weights_only)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and explain what is wrong in one line."""
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, ValueError) as error:  # the latter from a path with a zero byte
            actions = parser._actions
            unknown = re.match(r"unrecognized arguments: --data\.(\w+)", str(error))
            if unknown and unknown[1] in inspect.signature(PicturesDataModule).parameters:
                raise UserError(f"--data.{unknown[1]} is for pictures other than Fashion-MNIST's: add --data") from None
            known = [flag[2:] for action in actions for flag in action.option_strings if not flag.endswith(".help")]
            raise UserError(explain(str(error), self.command.given(), known)) from None
        seed = self.config.seed_everything
        if not isinstance(seed, bool) and not 0 <= (-1 if seed is None else seed) <= LARGEST_SEED:
            raise UserError(f"seed_everything={seed} must lie between 0 and {LARGEST_SEED}")

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on other settings, then check the result against machine and checkpoint."""
        config, command = self.config, self.command
        check_configuration(config, command, self.data_class)
        take_over_processes(config.trainer)
        net = config.model.net
        follow = {"image_size": config.data.image_size}
        if issubclass(self.data_class, PicturesDataModule):
            follow |= follow_pictures(config, command, self.start.seen or self.start.settings.get("data", {}))
        flags = {name.replace(".init_args", "") for name, file in command.given().items() if not file}
        known = {*inspect.signature(named(net.class_path)).parameters, *(net.get("init_args") or Namespace()).keys()}
        for name in follow.keys() & known:
            if f"model.net.{name}" in flags and net.init_args[name] != follow[name]:
                given = net.init_args[name]
                raise UserError(
                    f"model.net.{name}={given} does not fit the pictures, which need {follow[name]}; leave it out"
                )
            net.init_args[name] = follow[name]
        asked_for = command.asked_for("trainer.precision") or bool(command.images)  # which are computed in float32
        config.trainer.precision, self.why_precision = precision(config.trainer, asked_for, self.start.precision)
        if self.start.settings:
            wanted = yaml.safe_load(self._text())
            check_settings(self.start.settings, wanted, resume=command.subcommand == "fit")
        self.trials = Trials(self.parser, command.find_batch_size, command.find_lr)
        if (command.find_batch_size or command.find_lr) and not command.print_model:
            for name, value in self.trials.settings(config).items():
                config[name] = value

    def instantiate_classes(self) -> None:
        """Build network, data module and Trainer; try the network on the shape of one image."""
        with explained(self.config.model.net.class_path):
            super().instantiate_classes()
        check_network(self.model.net, self.config.model.net.class_path, self.command.subcommand == "fit")
        shape, classes = self.datamodule.input_shape, len(self.datamodule.class_names)
        if (given := self.model.hparams["num_classes"]) != classes:
            raise UserError(f"model.num_classes={given}, but the pictures have {classes} classes; leave it out")
        alone = self.command.subcommand == "fit" and not self.config.trainer.sync_batchnorm
        check_input(self.model.net, shape, classes, self.config.data.batch_size if alone else 2)
        if self.command.print_model:
            print(table(self.model.net, shape))
            sys.exit(0)
        check_weights(self.command.ckpt_path, self.start.shapes, self.model)
        check_rank(self.trainer.world_size)
        check_trainer(self.trainer, self.config.trainer, self.model.net)
        if self.command.subcommand == "fit":
            check_training(self.trainer, self.model, self.config.model, validates(self.config))
            warn_of_interval(self.config.model, self.command)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, GradientAccumulationScheduler):
                    check_accumulation(self.config.model.compile, max(callback.scheduling.values()))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this project's logger and callbacks beside the user's own."""
        more = self.callbacks.trainer_arguments(
            self.config, self.config_init, self._text(), self.model, self.datamodule, self.trials.curve
        )
        try:
            trainer = super().instantiate_trainer(**kwargs | more)
        except (TypeError, ImportError) as error:  # of --trainer.devices abc, of an accelerator's missing package
            raise UserError(one_line(str(error))) from None
        except RuntimeError as error:
            if "stateful callback" not in str(error):
                raise
            raise UserError(f"two callbacks with the same settings; leave one out: {one_line(str(error))}") from None
        self.processes.launcher = trainer.strategy.launcher
        return trainer

    def _text(self) -> str:
        """The resolved configuration as YAML."""
        return self.parser.dump(self.config, skip_none=False)
