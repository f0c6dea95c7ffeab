"""LightningCLI with this project's defaults: logger, callbacks, precision, and checkpoints that describe themselves."""

import errno
import inspect
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from callbacks.confusion import Confusion
from callbacks.divergence_guard import ADVICE, DivergenceGuard, is_overflow
from callbacks.exact_resume import ExactResume
from callbacks.graceful_stop import GracefulStop
from callbacks.grad_cam import MistakesExplained
from callbacks.lr_curve import LearningRateCurve
from callbacks.model_table import ModelTable, table
from callbacks.no_profiler import NoProfiler
from callbacks.prediction_writer import PredictionWriter
from callbacks.processes import Processes
from callbacks.progress import progress_callback
from callbacks.run_record import RunRecord
from callbacks.speed import Speed
from callbacks.temperature import Temperature
from callbacks.tensorboard_pictures import TensorBoardPictures
from checkpoint_io import AtomicCheckpointIO
from checkpoints import read_checkpoint, stored_config
from checks import (
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
from command_line import Command, load_yaml
from datamodules import CLASS_NAMES, DatasetError, FashionMNISTDataModule
from errors import Diverged, RunError, UserError
from lit_modules import LitClassifier
from lr_finder import HIGHEST, LOWEST, STEPS, Curve, find_learning_rate, from_first_process
from memory import advice as memory_advice
from memory import is_out_of_memory, keep_freed_memory, largest_batch_size
from parser_errors import explain, one_line
from summary import scores, shown, summary

LARGEST_SEED = 2**32 - 1  # that NumPy accepts
# Errors that lie with the disk, not with the program.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)
LARGEST_BATCH = 8192  # larger ones leave too few steps in an epoch
FOUND = "CLASSIC_CNNS_FOUND"  # where the first process leaves what it found by trial for those that it starts
LOST_CONNECTION = r"(?i)gloo|nccl|connection (closed|reset|refused)|broken pipe"


def run(command: Command) -> None:
    """Run a checked command line.

    Raises:
        UserError: For every mistake of the user's.
    """
    _quiet()
    if not torch.cuda.is_available():
        # Lightning has PyTorch ask NVIDIA's library for GPUs; where there is none, each optimiser step looks for it.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    keep_freed_memory()
    sys.path.append(str(Path.cwd()))  # where networks of the user's own lie
    processes = Processes()
    try:
        _run(command, processes)
    except BaseException as error:
        if re.search(LOST_CONNECTION, str(error)):
            processes.await_loss()
        processes.kill_children()
        raise
    finally:
        _end_workers()


def _end_workers() -> None:
    """End what a run that was broken off left of its loaders' workers, which ignore the signals that stop a run."""
    if workers := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else PyTorch reports their end as an error
        for worker in workers:
            worker.kill()


def _run(command: Command, processes: Processes) -> None:
    try:
        ClassifierCLI(command, processes)
    except DatasetError as error:
        raise UserError(str(error)) from None
    except (MisconfigurationException, ArgumentError) as error:
        raise UserError(one_line(str(error))) from None
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise RunError(f"{error.filename or 'a file of the run'} can't be written: {error.strerror}") from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into exit code 1
            raise KeyboardInterrupt from None
        raise


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
    """Builds and runs what one `Command` asks for.

    Args:
        command: The checked command line.
        processes: The callback that watches the run's other processes.

    Raises:
        UserError: If the configuration is not valid, or contradicts the checkpoint.
    """

    def __init__(self, command: Command, processes: Processes) -> None:
        self.command = command
        self.processes = processes
        self.stored: dict[str, Any] = {}
        self.stored_shapes: dict[str, tuple[int, ...]] = {}
        self.recipe = command.recipe or ""
        if command.ckpt_path:
            self._read_checkpoint()
        self.recipe = self.recipe or "unnamed"
        self.speed = Speed()
        self.curve: Curve | None = None
        try:
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
        except (RuntimeError, MemoryError) as error:
            if is_overflow(error):
                processes.ignore_ends()  # they all end so
                first = os.environ.get("LOCAL_RANK", "0") == "0"
                raise Diverged(
                    f"the optimiser's step is too large for the weights; {ADVICE}" if first else ""
                ) from None
            if not is_out_of_memory(error):
                raise
            data = self.config[command.subcommand].data
            training = command.subcommand == "fit"
            size, flag = data.batch_size, "--batch_size"
            if not training:
                size, flag = data.eval_batch_size or size, "--data.eval_batch_size"
            raise RunError(memory_advice(size, data.image_size, flag)) from None

    def __deepcopy__(self, memo: dict) -> "ClassifierCLI":
        """Weight averaging copies the model, whose optimiser's factory refers to this object: that is no part of it."""
        return self

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
        parser.add_argument(
            "--histograms",
            type=bool,
            default=False,
            help="Log histograms of weights and gradient norms to TensorBoard; costs time.",
        )
        parser.add_argument(
            "--stop_at_chance",
            type=bool,
            default=False,
            help="Stop if the loss of the first 500 batches is that of guessing, instead of only saying so.",
        )
        parser.add_argument(
            "--pretrained", type=bool, default=False, help="Start a new run of VGG from torchvision's ImageNet weights."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and explain what is wrong in one line."""
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, ValueError) as error:  # the latter from a path with a zero byte
            actions = self._parser(self.command.subcommand)._actions
            known = [flag[2:] for action in actions for flag in action.option_strings if not flag.endswith(".help")]
            raise UserError(explain(str(error), self._given(), known)) from None
        seed = self.config[self.command.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= (-1 if seed is None else seed) <= LARGEST_SEED:
            raise UserError(f"seed_everything={seed} must lie between 0 and {LARGEST_SEED}")

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on other settings, then hold the result against machine and checkpoint."""
        config = self.config[self.subcommand]
        for section in ("model", "data", "trainer"):
            if not isinstance(config[section], Namespace):
                raise UserError(f"{section} is {config[section]!r}; a mapping of settings was expected")
        check_nulls(config.model, LitClassifier, "model")
        check_nulls(config.data, FashionMNISTDataModule, "data")
        check_accelerator(config.trainer.accelerator)
        check_accumulation(config.model.compile, config.trainer.accumulate_grad_batches)
        found = ["--model.optimizer.lr"] if self.command.find_lr else []
        check_learning_rate(config.model.scheduler, [*self.command.overrides, *found])
        net = config.model.net
        if "image_size" in inspect.signature(imported(net.class_path)).parameters:
            net.init_args.image_size = config.data.image_size
        if config.trainer.precision is None and config.trainer.accelerator in ("auto", "gpu", "cuda"):
            config.trainer.precision = _gpu_precision()
        self.slow_bf16 = config.trainer.precision == "bf16-mixed" and not self._computes_bf16(config)
        if self.slow_bf16:
            config.trainer.precision = "32-true"
        if self.stored:
            wanted = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
            check_settings(self.stored, wanted, resume=self.subcommand == "fit")
        if (self.command.find_batch_size or self.command.find_lr) and not self.command.print_model:
            for name, value in self._found(config).items():
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
        check_weights(self.command.ckpt_path, self.stored_shapes, self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this project's logger and callbacks beside the user's own."""
        config = self.config_init[self.subcommand]
        callbacks = config.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        logger: Any = False
        if self.subcommand == "fit":
            logger = config.trainer.logger
            if logger in (None, True):
                logger = self._tensorboard(config.log_dir)
            callbacks += self._fit_callbacks(logger)
        elif self.subcommand == "predict" and not self.command.images:
            self.predictions = PredictionWriter(self._run_folder() / "predictions.csv", CLASS_NAMES)
            self.confusion = Confusion(CLASS_NAMES)
            callbacks += [self.predictions, *([self.confusion] if self.command.gradcam else [])]
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(progress_callback(self.speed))
        # Last, so that they see what the others have done.
        callbacks += [self.processes, ExactResume(), GracefulStop(self.processes, self._how_to_continue)]
        plugins = config.trainer.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        kwargs |= {"logger": logger, "callbacks": callbacks, "plugins": plugins, "enable_model_summary": False}
        if torch.cuda.is_available() and config.trainer.benchmark is None:
            kwargs["benchmark"] = True
        if config.trainer.profiler is None:
            kwargs["profiler"] = NoProfiler()
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ImportError) as error:  # of --trainer.devices abc, of an accelerator's missing package
            raise UserError(one_line(str(error))) from None

    def before_fit(self) -> None:
        """Load weights and data, so that nothing is written if that fails; then say what is about to run, where."""
        if self.config[self.subcommand].pretrained and not self.command.ckpt_path:
            started = self._start_from_imagenet(self.model.net)
            if self.trainer.is_global_zero:
                print(started)
        self.datamodule.setup("fit")
        try:
            Path(self.config[self.subcommand].log_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"runs can't be written to {error.filename}: {error.strerror}; set --log_dir") from None
        if self.trainer.is_global_zero:
            where = f"{self.trainer.world_size} x {self.trainer.strategy.root_device.type}"
            reason = " (this CPU has no bfloat16 instructions)" if self.slow_bf16 else ""
            print(f"Training {self.recipe} on {where}, precision {self.trainer.precision}{reason}", flush=True)

    def _start_from_imagenet(self, net: nn.Module) -> str:
        from pretrained import start_from_imagenet  # here, not above: only this needs torchvision's networks

        data = self.config[self.subcommand].data
        return start_from_imagenet(net, data.mean, data.std)

    def after_fit(self) -> None:
        """Test the best checkpoint and print the summary, where no subcommand was given."""
        if self.command.then_test:
            self.trainer.test(
                self.model, self.datamodule, self._best_checkpoint() or None, verbose=False, weights_only=True
            )
        if self.trainer.is_global_zero:
            record = next(callback.record for callback in self.trainer.callbacks if isinstance(callback, RunRecord))  # type: ignore[attr-defined]
            print(summary(record, self.trainer, self._best_checkpoint()), flush=True)

    def validate(self, **kwargs: Any) -> None:
        """Run and print one line."""
        self._measure("validate", "val", **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Run and print one line."""
        self._measure("test", "test", **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Run, keep no probabilities in memory, and say where the file is."""
        if self.command.images:
            self._predict_pictures()
            return
        if self.command.gradcam:
            from pictures.grad_cam import check_captum  # here, not above: only this needs it

            check_captum()
        self.trainer.predict(**{**kwargs, "return_predictions": False})
        print(f"Wrote the class probabilities of {self.predictions.images:,} images to {self.predictions.path}")
        if self.command.gradcam and self.trainer.is_global_zero:
            self._explain_mistakes()

    def _explain_mistakes(self) -> None:
        from pictures.predict import write_mistakes

        path = self._run_folder() / "mistakes.png"
        write_mistakes(self.trainer, self.model, self.datamodule, CLASS_NAMES, self.confusion.mistakes, path)

    def _predict_pictures(self) -> None:
        from pictures.predict import predict_pictures  # here, not above: only this needs it

        predict_pictures(
            self.trainer,
            self.model,
            self.datamodule,
            CLASS_NAMES,
            ckpt_path=str(self.command.ckpt_path),
            images=self.command.images,
            invert=self.command.invert,
            output=self.command.output,
            gradcam=self.command.gradcam,
            folder=self._run_folder(),
        )

    def _parse_ckpt_path(self) -> None:
        """Not needed: the checkpoint's configuration is part of the arguments."""

    def _measure(self, function: str, stage: str, **kwargs: Any) -> None:
        getattr(self.trainer, function)(**{**kwargs, "verbose": False})
        if self.trainer.is_global_zero:
            data = self.datamodule.val_set if stage == "val" else self.datamodule.test_set
            measured = {name.removeprefix(f"{stage}/"): value for name, value in self.trainer.callback_metrics.items()}
            print(f"{function} on {len(data):,} images: {scores(measured)}")

    def _arguments(self) -> list[str]:
        command = self.command
        arguments = [command.subcommand]
        if self.stored and not command.configs:
            base = {"model": self.stored["model"], "data": self.stored["data"]}
            base["seed_everything"] = self.stored.get("seed_everything", 0)
            base["trainer"] = {"precision": (self.stored.get("trainer") or {}).get("precision")}
            if command.subcommand == "fit":
                base["trainer"] = self.stored.get("trainer") or {}
                base["pretrained"] = bool(self.stored.get("pretrained"))
            arguments.append(f"--config={yaml.safe_dump(base)}")
        for path in command.outer_configs:
            arguments.append(f"--config={yaml.safe_dump(load_yaml(path).get(command.subcommand) or {})}")
        arguments += [f"--config={path}" for path in command.configs]
        if command.ckpt_path:
            arguments.append(f"--ckpt_path={command.ckpt_path}")
        arguments += ["--weights_only=true", *command.overrides]
        if command.images:
            # A few pictures are worth neither processes nor a bar nor compiling, and Grad-CAM hooks into plain modules.
            arguments += ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.enable_progress_bar=false"]
            arguments.append("--model.compile=false")
        return arguments

    def _read_checkpoint(self) -> None:
        checkpoint = self._newest_valid()
        path = str(self.command.ckpt_path)
        if self.command.subcommand == "fit" and "optimizer_states" not in checkpoint:
            raise UserError(
                f"{path} holds weights alone, without the optimiser's state: training can't continue from it"
            )
        self.stored_shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        self.recipe = self.recipe or str(checkpoint.get("recipe") or "")
        if "config" in checkpoint or not self.command.configs:
            # The classes that a recipe of the user's own names are trusted: the user named them.
            trust = self.command.trust_checkpoint or bool(self.command.configs)
            self.stored = stored_config(checkpoint, path, trust)

    def _newest_valid(self) -> dict[str, Any]:
        """The checkpoint to start from; with `--ckpt_path last`, an older one if that is damaged."""
        damages = []
        for path in (str(self.command.ckpt_path), *self.command.fallbacks):
            try:
                checkpoint = read_checkpoint(Path(path))
            except UserError as error:
                damages.append(error)
                continue
            if damages and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"train.py: warning: {damages[0]}; starting from {path}", file=sys.stderr, flush=True)
            self.command.ckpt_path = path
            return checkpoint
        raise damages[0]

    def _how_to_continue(self, path: Path) -> str:
        """The same command line with the checkpoint in it."""
        arguments = list(self.command.arguments)
        for position, token in reversed([*enumerate(arguments)]):
            if token.split("=")[0] == "--ckpt_path":
                del arguments[position : position + (1 if "=" in token else 2)]
        config = self.config[self.subcommand]
        if self.command.find_batch_size:
            _replace(arguments, "--batch_size", config.data.batch_size)
        if self.command.find_lr:
            _replace(arguments, "--lr", config.model.optimizer.init_args.lr)
        named = any(token.split("=")[0] == "--model" for token in arguments)
        return shlex.join(["python", "train.py", *arguments, "--ckpt_path", "last" if named else shown(path)])

    def _given(self) -> dict[str, str]:
        """Each setting that the user made, flags first, and the file that holds it."""
        given = {token.lstrip("-").partition("=")[0]: "" for token in self.command.overrides if token.startswith("--")}
        for path in reversed((*self.command.outer_configs, *self.command.configs)):  # a later file wins
            for name in _dotted(load_yaml(path)):
                given.setdefault(name.removeprefix(f"{self.command.subcommand}."), str(path))
        return given

    def _found(self, config: Namespace) -> dict[str, float]:
        """The settings that the first process finds by trial, the same on all processes."""
        if os.environ.get("LOCAL_RANK", "0") == "0" or FOUND not in os.environ:
            found = from_first_process(lambda: self._find(config.clone()), self._bare_trainer(config))
            os.environ[FOUND] = json.dumps(found)
        return json.loads(os.environ[FOUND])

    def _find(self, config: Namespace) -> dict[str, float]:
        """The batch size first: the learning rate depends on it."""
        found: dict[str, float] = {}
        if self.command.find_batch_size:
            config.data.batch_size = found["data.batch_size"] = self._find_batch_size(config)
        if self.command.find_lr:
            found["model.optimizer.init_args.lr"] = self._find_lr(config)
        return found

    def _bare_trainer(self, config: Namespace) -> Trainer:
        """Knows the run's processes, and nothing else of it."""
        settings = {name: config.trainer[name] for name in ("accelerator", "devices", "num_nodes", "strategy")}
        if not isinstance(settings["strategy"], str):
            settings["strategy"] = self._to_spend(config).trainer.strategy
        try:
            return Trainer(**settings, logger=False, enable_checkpointing=False, enable_model_summary=False)
        except (TypeError, ImportError) as error:
            raise UserError(one_line(str(error))) from None

    def _to_spend(self, config: Namespace) -> Namespace:
        """A network and data for a trial, so that the run's own are initialised as without one."""
        try:
            with torch.random.fork_rng():
                own = self._parser(self.subcommand).instantiate_classes(config)
        except ValueError as error:
            raise UserError(one_line(str(error))) from None
        check_input(own.model.net, own.data.input_shape, own.model.hparams["num_classes"])
        return own

    def _find_batch_size(self, config: Namespace) -> int:
        on_gpu = torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda")
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(config.trainer.precision))
        shape = (config.data.channels, config.data.image_size, config.data.image_size)
        model = self._to_spend(config).model
        device = torch.device("cuda" if on_gpu else "cpu")
        with torch.random.fork_rng():
            size = largest_batch_size(model.net, model.optimizer, shape, device, dtype, LARGEST_BATCH)
        print(f"Batch size {size}: the largest power of two that fits, up to {LARGEST_BATCH}", flush=True)
        return size

    def _find_lr(self, config: Namespace) -> float:
        names = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic")
        settings = {name: config.trainer[name] for name in names}
        # One process accumulates the batches that all would have.
        trainer = self._bare_trainer(config)
        accumulated = config.trainer.accumulate_grad_batches * trainer.world_size
        own = self._to_spend(config)
        if config.pretrained:
            self._start_from_imagenet(own.model.net)
        print(f"Trying {STEPS} learning rates from {LOWEST:g} to {HIGHEST:g}", flush=True)
        self.curve = find_learning_rate(own.model, own.data, trainer.strategy.root_device, accumulated, **settings)
        rate = self.curve.learning_rate
        print(f"Learning rate {rate:g}: a tenth of that with the lowest loss", flush=True)
        return rate

    def _computes_bf16(self, config: Any) -> bool:
        """False where a recipe's bf16-mixed would run on a CPU that only imitates it, many times slower."""
        asked_for = any(token.startswith("--trainer.precision") for token in self.command.overrides)
        accelerator = config.trainer.accelerator
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
        return asked_for or not on_cpu or cpu_has_bfloat16()

    def _tensorboard(self, log_dir: str) -> Logger:
        run = self._run_folder()
        root = Path(log_dir).resolve()  # else a run continued from another working folder forgets its best epoch
        continued = run.resolve().parent == root / self.recipe and run.name.startswith("version_")
        version = int(run.name.removeprefix("version_")) if continued else None
        return TensorBoardLogger(root, self.recipe, version, default_hp_metric=False)

    def _run_folder(self) -> Path:
        """The folder of the run that the checkpoint belongs to, or the current one."""
        parent = Path(self.command.ckpt_path or "").parent
        return parent.parent if parent.name == "checkpoints" else Path()

    def _fit_callbacks(self, logger: Any) -> list[Callback]:
        config = self.config[self.subcommand]
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        confusion = Confusion(CLASS_NAMES)
        callbacks = [
            self.speed,
            confusion,
            RunRecord(self.recipe, yaml.safe_load(text), text, self.speed, confusion),
            ModelTable(self.datamodule.input_shape),
            Temperature(),
        ]
        if self.command.find_lr:
            callbacks.append(LearningRateCurve(self.curve))
        if logger is not False:
            callbacks.append(LearningRateMonitor())
        if isinstance(logger, TensorBoardLogger):
            callbacks += [TensorBoardPictures(confusion, config.histograms), MistakesExplained(confusion)]
        validates = config.data.val_size > 0
        if config.trainer.enable_checkpointing is not False:
            # Two callbacks: `save_last` saves only the epochs that are the best so far.
            best: dict[str, Any] = {"filename": "best", "monitor": "val/accuracy", "mode": "max"}
            for settings in [*([best] if validates else []), {"filename": "last"}]:
                callbacks.append(ModelCheckpoint(**settings, enable_version_counter=False))
        stop = config.stop_at_chance
        callbacks.append(DivergenceGuard(self.processes, self.model.hparams["num_classes"], stop_at_chance=stop))
        if config.patience:
            if not validates:
                raise UserError("--patience needs validation images: set --val_size above 0")
            callbacks.append(EarlyStopping("val/accuracy", mode="max", patience=config.patience))
        return callbacks

    def _best_checkpoint(self) -> str:
        """Its path; empty where nothing was saved."""
        callback = self.trainer.checkpoint_callback
        return callback.best_model_path if isinstance(callback, ModelCheckpoint) else ""


def _replace(arguments: list[str], flag: str, value: float) -> None:
    """Give the flag's value in place of what stands there."""
    for position, token in reversed([*enumerate(arguments)]):
        if token.split("=")[0] == flag:
            del arguments[position : position + (1 if "=" in token else 2)]
    arguments.append(f"{flag}={value}")


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
        "The dirpath has changed from",  # the folder of the runs was moved, or a test has none
        "torch.distributed.nn.functional.all_gather is deprecated",  # inside Lightning
        "Total length of `.*` across ranks is zero",  # no validation images are wanted
        "You're resuming from a checkpoint that ended before the epoch",  # TrainBatches goes on where it ended
    ):
        warnings.filterwarnings("ignore", message)


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
