"""LightningCLI with this project's defaults: logger, callbacks, precision, and checkpoints that describe themselves."""

import importlib
import inspect
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.model_table import ModelTable, stages, table
from callbacks.prediction_writer import PredictionWriter
from callbacks.progress import progress_callback
from callbacks.run_record import RunRecord
from callbacks.speed import Speed
from checkpoints import read_checkpoint, stored_config
from command_line import Command, load_yaml
from datamodules import CLASS_NAMES, DatasetError, FashionMNISTDataModule
from errors import UserError
from lit_modules import LitClassifier

# What a continued run may change: how it runs, not what it computes.
FREE_ON_RESUME = ("data.data_dir", "data.num_workers", "data.eval_batch_size", "model.compile", "model.channels_last")


def run(command: Command) -> None:
    """Run a checked command line.

    Raises:
        UserError: For every mistake of the user's.
    """
    _quiet()
    sys.path.append(str(Path.cwd()))  # where networks of the user's own lie
    try:
        ClassifierCLI(command)
    except DatasetError as error:
        raise UserError(str(error)) from None
    except MisconfigurationException as error:
        raise UserError(_one_line(str(error))) from None


class OneLineParser(LightningArgumentParser):
    """An argument parser whose errors are one line, and which accepts no abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise `UserError` instead of printing the usage."""
        raise UserError(_one_line(message)) from None


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
        checkpoint["config"] = self.parser.dump(self.config, skip_none=False, skip_link_targets=False)


class ClassifierCLI(LightningCLI):
    """Builds and runs what one `Command` asks for.

    Args:
        command: The checked command line.

    Raises:
        UserError: If the configuration is not valid, or contradicts the checkpoint.
    """

    def __init__(self, command: Command) -> None:
        self.command = command
        self.stored: dict[str, Any] = {}
        self.recipe = command.recipe
        if command.ckpt_path:
            self._read_checkpoint(command.ckpt_path)
        self.recipe = self.recipe or "unnamed"
        self.speed = Speed()
        super().__init__(
            LitClassifier,
            FashionMNISTDataModule,
            save_config_callback=SaveConfig if command.subcommand == "fit" else None,
            save_config_kwargs={"recipe": self.recipe, "overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0, "use_distributed_sampler": False},
            parser_class=OneLineParser,
            args=self._arguments(),
            auto_configure_optimizers=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the subcommand in use: building the parsers of all four takes a second."""
        return {self.command.subcommand: super().subcommands()[self.command.subcommand]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The two flags that belong to no class."""
        parser.add_argument("--log_dir", type=str, default="logs", help="Folder of the runs.")
        parser.add_argument(
            "--patience",
            type=PositiveInt | None,
            default=None,
            help="Stop after this many epochs without a better validation accuracy.",
        )

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on other settings, then hold the result against the checkpoint."""
        config = self.config[self.subcommand]
        net = config.model.net
        module, _, name = net.class_path.rpartition(".")
        if "image_size" in inspect.signature(getattr(importlib.import_module(module), name)).parameters:
            net.init_args.image_size = config.data.image_size
        if config.trainer.precision is None and config.trainer.accelerator in ("auto", "gpu", "cuda"):
            config.trainer.precision = _gpu_precision()
        if self.stored:
            self._check_against_checkpoint()

    def instantiate_classes(self) -> None:
        """Build network, data module and Trainer; try the network on the shape of one image."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UserError(_one_line(str(error))) from None
        shape = self.datamodule.input_shape
        if self.command.print_model:
            print(table(self.model.net, shape))
            sys.exit(0)
        _check_fit(self.model.net, shape, self.model.hparams["num_classes"])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this project's logger and callbacks beside the user's own."""
        config = self.config_init[self.subcommand]
        callbacks = config.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        logger = False
        if self.subcommand == "fit":
            logger = config.trainer.logger
            if logger in (None, True):
                logger = self._tensorboard(config.log_dir)
            callbacks += self._fit_callbacks(logger is not False)
        elif self.subcommand == "predict":
            self.predictions = PredictionWriter(self._run_folder() / "predictions.csv", CLASS_NAMES)
            callbacks.append(self.predictions)
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(progress_callback(self.speed))
        kwargs |= {"logger": logger, "callbacks": callbacks, "enable_model_summary": False}
        if torch.cuda.is_available() and config.trainer.benchmark is None:
            kwargs["benchmark"] = True
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Say what is about to run, where."""
        if self.trainer.is_global_zero:
            where = f"{self.trainer.world_size} x {self.trainer.strategy.root_device.type}"
            print(f"Training {self.recipe} on {where}, precision {self.trainer.precision}", flush=True)

    def after_fit(self) -> None:
        """Test the best checkpoint and print the summary, where no subcommand was given."""
        if self.command.then_test:
            best = self.trainer.checkpoint_callback.best_model_path if self.trainer.checkpoint_callback else ""
            self.trainer.test(self.model, self.datamodule, best or None, verbose=False, weights_only=True)
        if self.trainer.is_global_zero:
            print(self._summary(), flush=True)

    def validate(self, **kwargs: Any) -> None:
        """Run and print one line."""
        self._measure("validate", "val", **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Run and print one line."""
        self._measure("test", "test", **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Run, keep no probabilities in memory, and say where the file is."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})
        print(f"Wrote the class probabilities of {self.predictions.images:,} images to {self.predictions.path}")

    def _parse_ckpt_path(self) -> None:
        """Not needed: the checkpoint's configuration is part of the arguments."""

    def _measure(self, function: str, stage: str, **kwargs: Any) -> None:
        getattr(self.trainer, function)(**{**kwargs, "verbose": False})
        if self.trainer.is_global_zero:
            data = self.datamodule.val_set if stage == "val" else self.datamodule.test_set
            accuracy, loss = (self.trainer.callback_metrics[f"{stage}/{name}"] for name in ("accuracy", "loss"))
            print(f"{function} on {len(data):,} images: accuracy {accuracy:.4f}, loss {loss:.4f}")

    def _arguments(self) -> list[str]:
        command = self.command
        arguments = [command.subcommand]
        if self.stored and not command.configs:
            base = {"model": self.stored["model"], "data": self.stored["data"]}
            base["seed_everything"] = self.stored.get("seed_everything", 0)
            base["trainer"] = {"precision": (self.stored.get("trainer") or {}).get("precision")}
            if command.subcommand == "fit":
                base["trainer"] = self.stored.get("trainer") or {}
            arguments.append(f"--config={yaml.safe_dump(base)}")
        for path in command.outer_configs:
            arguments.append(f"--config={yaml.safe_dump(load_yaml(path).get(command.subcommand) or {})}")
        arguments += [f"--config={path}" for path in command.configs]
        if command.ckpt_path:
            arguments.append(f"--ckpt_path={command.ckpt_path}")
        return [*arguments, "--weights_only=true", *command.overrides]

    def _read_checkpoint(self, path: str) -> None:
        checkpoint = read_checkpoint(Path(path))
        self.recipe = self.recipe or checkpoint.get("recipe")
        if "config" in checkpoint or not self.command.configs:
            # The classes that a recipe of the user's own names are trusted: the user named them.
            trust = self.command.trust_checkpoint or bool(self.command.configs)
            self.stored = stored_config(checkpoint, path, trust)

    def _check_against_checkpoint(self) -> None:
        """Refuse what the checkpoint would override in silence."""
        wanted = yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False))
        keys = (
            ("model", "data", "seed_everything", "trainer.accumulate") if self.subcommand == "fit" else ("model.net",)
        )
        if self.subcommand == "fit" and wanted["model"]["scheduler"]:
            keys += ("trainer.max_epochs", "trainer.max_steps")  # the schedule is as long as the run
        for name, (then, now) in _differences(self.stored, wanted).items():
            if name.startswith(keys) and name not in FREE_ON_RESUME:
                raise UserError(
                    f"the checkpoint was made with {name}={then}, not {now}; "
                    "a checkpoint keeps its settings: leave that setting as it was, or start anew without --ckpt_path"
                )

    def _tensorboard(self, log_dir: str) -> Logger:
        run = self._run_folder()
        continued = run.parent == Path(log_dir) / self.recipe and run.name.startswith("version_")
        version = int(run.name.removeprefix("version_")) if continued else None
        return TensorBoardLogger(log_dir, self.recipe, version, default_hp_metric=False)

    def _run_folder(self) -> Path:
        """The folder of the run that the checkpoint belongs to, or the current one."""
        parent = Path(self.command.ckpt_path or "").parent
        return parent.parent if parent.name == "checkpoints" else Path()

    def _fit_callbacks(self, logs: bool) -> list[Callback]:
        config = self.config[self.subcommand]
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        callbacks = [
            self.speed,
            RunRecord(self.recipe, yaml.safe_load(text), text, self.speed),
            ModelTable(self.datamodule.input_shape),
        ]
        if logs:
            callbacks.append(LearningRateMonitor())
        validates = config.data.val_size > 0
        if config.trainer.enable_checkpointing is not False:
            best = {"filename": "best", "monitor": "val/accuracy", "mode": "max", "save_last": True}
            last_only = {"filename": "last"}
            callbacks.append(ModelCheckpoint(**(best if validates else last_only), enable_version_counter=False))
        if config.patience:
            if not validates:
                raise UserError("--patience needs validation images: set --val_size above 0")
            callbacks.append(EarlyStopping("val/accuracy", mode="max", patience=config.patience))
        return callbacks

    def _summary(self) -> str:
        trainer = self.trainer
        record = next(callback.record for callback in trainer.callbacks if isinstance(callback, RunRecord))
        lines = [""]
        if test := record.get("test"):
            lines.append(f"Test on {test['images']:,} images: accuracy {test['accuracy']:.4f}, loss {test['loss']:.4f}")
        if "fit_seconds" in record:
            best = (
                f"; best validation accuracy {record['best_val_accuracy']:.4f}" if "best_val_accuracy" in record else ""
            )
            lines.append(
                f"Training: {len(record['epochs'])} epochs in {record['fit_seconds']:.1f} s, "
                f"{record['images_per_second']:,.0f} images/s{best}"
            )
        checkpoint = trainer.checkpoint_callback.best_model_path if trainer.checkpoint_callback else ""
        if checkpoint:
            path = _shown(checkpoint)
            lines.append(f"Checkpoint: {path}")
        if isinstance(trainer.logger, TensorBoardLogger):
            log_dir = _shown(trainer.logger.root_dir)
            lines.append(f"Logs: {_shown(trainer.logger.log_dir)}")
            lines.append(f"Next: tensorboard --logdir {log_dir}")
        if checkpoint:
            lines.append(f"      python train.py predict --ckpt_path {path}")
        return "\n".join(lines)


def _quiet() -> None:
    """Keep Lightning's hints and notices out of a normal run."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "LightningCLI's args parameter is intended",  # the arguments are translated on purpose
        ".*does not have many workers",  # fetching a batch takes microseconds
        "The number of training batches .* is smaller than the logging interval",
        "You have overridden `on_before_batch_transfer`",  # LitClassifier seeds the step there, for any data module
        "Be aware that when using `ckpt_path`, callbacks",  # a test needs no checkpoint callback
        "Checkpoint directory .* exists and is not empty",  # a continued run goes on in its own folder
        "You are using a custom batch sampler `EvalBatches`",  # which returns every image
        ".*LeafSpec.* is deprecated",  # inside Lightning
    ):
        warnings.filterwarnings("ignore", message)


def _gpu_precision() -> str | None:
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        torch.set_float32_matmul_precision("high")
        return "bf16-mixed"
    return None


def _check_fit(net: torch.nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
    """Try the network on the shape of one image before anything is written."""
    name = type(net).__name__
    try:
        _, total = stages(net, shape)
    except NotImplementedError:
        return  # an operation that can't run without data: training will tell
    except (RuntimeError, ValueError) as error:
        size = "x".join(map(str, shape))
        raise UserError(
            f"{name} can't take images of {size} (channels x height x width): {_one_line(str(error))}"
        ) from None
    if total.shape != (num_classes,):
        raise UserError(
            f"{name} gives outputs of shape {total.shape} for one image; {num_classes} logits were expected"
        )


def _differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in then.keys() & now.keys():
        if isinstance(then[key], dict) and isinstance(now[key], dict):
            found |= _differences(then[key], now[key], f"{prefix}{key}.")
        elif then[key] != now[key]:
            found[f"{prefix}{key}"] = (then[key], now[key])
    return dict(sorted(found.items()))


def _shown(path: str | Path) -> str:
    """The path as one would type it from here."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _one_line(message: str) -> str:
    return " ".join(message.split())
