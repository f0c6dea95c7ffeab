"""LightningCLI with this project's classes and defaults, and with errors of one line: it parses, checks and builds."""

import inspect
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from callbacks.processes import Processes
from cli.command import Command
from cli.messages import explain, one_line
from cli.recipes import load_yaml
from datamodules import FashionMNISTDataModule
from errors import UserError
from inspection.stages import table
from launch.checks import (
    check_accelerator,
    check_accumulation,
    check_input,
    check_learning_rate,
    check_nulls,
    check_settings,
    check_weights,
    cpu_has_bfloat16,
    imported,
)
from launch.found import Trials
from launch.start import Start
from launch.trainer import RunCallbacks
from lit_modules import LitClassifier

LARGEST_SEED = 2**32 - 1  # that NumPy accepts


class OneLineParser(LightningArgumentParser):
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
        kwargs: As for Lightning's `SaveConfigCallback`.
    """

    def __init__(self, *args: Any, recipe: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint tell how it was trained."""
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

    def build(self) -> None:
        """Parse, check, and build network, data module and Trainer.

        Raises:
            UserError: If the configuration is not valid, or contradicts the checkpoint.
        """
        self.callbacks = RunCallbacks(self.start, self.processes)
        super().__init__(
            LitClassifier,
            FashionMNISTDataModule,
            save_config_callback=SaveConfig if self.command.subcommand == "fit" else None,
            save_config_kwargs={"recipe": self.start.recipe, "overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0, "use_distributed_sampler": False},
            parser_class=OneLineParser,
            parser_kwargs={"prog": f"train.py [options] {self.command.subcommand}"},
            args=self.start.arguments(),
            run=False,
            auto_configure_optimizers=False,
        )

    def __deepcopy__(self, memo: dict) -> "ClassifierCLI":
        """Weight averaging copies the model, whose optimiser's factory refers to this object: that is no part of it."""
        return self

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The flags that belong to no class."""
        for name, kind, default, text in (
            ("log_dir", str, "logs", "Folder of the runs."),
            ("patience", PositiveInt | None, None, "Stop after this many epochs without a better validation accuracy."),
            ("histograms", bool, False, "Log histograms of weights and gradient norms to TensorBoard; costs time."),
            (
                "stop_at_chance",
                bool,
                False,
                "Stop if the loss of the first 500 batches is that of guessing, instead of only saying so.",
            ),
            ("pretrained", bool, False, "Start a new run of VGG from torchvision's ImageNet weights."),
            ("ckpt_path", str | None, None, "Checkpoint to start from."),
            ("weights_only", bool | None, None, "Always true here: nothing in a checkpoint is executed."),
        ):
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and explain what is wrong in one line."""
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, ValueError) as error:  # the latter from a path with a zero byte
            actions = parser._actions
            known = [flag[2:] for action in actions for flag in action.option_strings if not flag.endswith(".help")]
            raise UserError(explain(str(error), self._given(), known)) from None
        seed = self.config.seed_everything
        if not isinstance(seed, bool) and not 0 <= (-1 if seed is None else seed) <= LARGEST_SEED:
            raise UserError(f"seed_everything={seed} must lie between 0 and {LARGEST_SEED}")

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on other settings, then hold the result against machine and checkpoint."""
        config, command = self.config, self.command
        for section in ("model", "data", "trainer"):
            if not isinstance(config[section], Namespace):
                raise UserError(f"{section} is {config[section]!r}; a mapping of settings was expected")
        check_nulls(config.model, LitClassifier, "model")
        check_nulls(config.data, FashionMNISTDataModule, "data")
        check_accelerator(config.trainer.accelerator)
        check_accumulation(config.model.compile, config.trainer.accumulate_grad_batches)
        found = ["--model.optimizer.lr"] if command.find_lr else []
        check_learning_rate(config.model.scheduler, [*command.overrides, *found])
        net = config.model.net
        if "image_size" in inspect.signature(imported(net.class_path)).parameters:
            net.init_args.image_size = config.data.image_size
        if config.trainer.precision is None and config.trainer.accelerator in ("auto", "gpu", "cuda"):
            config.trainer.precision = _gpu_precision()
        self.slow_bf16 = config.trainer.precision == "bf16-mixed" and not self._computes_bf16(config)
        if self.slow_bf16:
            config.trainer.precision = "32-true"
        if self.start.settings:
            wanted = yaml.safe_load(self._text())
            check_settings(self.start.settings, wanted, resume=command.subcommand == "fit")
        self.trials = Trials(self.parser, command.find_batch_size, command.find_lr)
        if (command.find_batch_size or command.find_lr) and not command.print_model:
            for name, value in self.trials.settings(config).items():
                config[name] = value

    def instantiate_classes(self) -> None:
        """Build network, data module and Trainer; try the network on the shape of one image."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UserError(one_line(str(error))) from None
        shape = self.datamodule.input_shape
        if self.command.print_model:
            print(table(self.model.net, shape))
            sys.exit(0)
        check_input(self.model.net, shape, self.model.hparams["num_classes"])
        check_weights(self.command.ckpt_path, self.start.shapes, self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this project's logger and callbacks beside the user's own."""
        more = self.callbacks.trainer_arguments(
            self.config, self.config_init, self._text(), self.model, self.datamodule, self.trials.curve
        )
        try:
            return super().instantiate_trainer(**kwargs | more)
        except (TypeError, ImportError) as error:  # of --trainer.devices abc, of an accelerator's missing package
            raise UserError(one_line(str(error))) from None

    def _text(self) -> str:
        """The resolved configuration as YAML."""
        return self.parser.dump(self.config, skip_none=False)

    def _given(self) -> dict[str, str]:
        """Each setting that the user made, flags first, and the file that holds it."""
        command = self.command
        given = {token.lstrip("-").partition("=")[0]: "" for token in command.overrides if token.startswith("--")}
        for path in reversed((*command.outer_configs, *command.configs)):  # a later file wins
            for name in _dotted(load_yaml(path)):
                given.setdefault(name.removeprefix(f"{command.subcommand}."), str(path))
        return given

    def _computes_bf16(self, config: Any) -> bool:
        """False where a recipe's bf16-mixed would run on a CPU that only imitates it, many times slower."""
        asked_for = any(token.startswith("--trainer.precision") for token in self.command.overrides)
        accelerator = config.trainer.accelerator
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
        return asked_for or not on_cpu or cpu_has_bfloat16()


def _gpu_precision() -> str | None:
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        torch.set_float32_matmul_precision("high")
        return "bf16-mixed"
    return None


def _dotted(mapping: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
