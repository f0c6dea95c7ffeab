"""The Trainer's logger, callbacks and plugins: this project's and the user's own."""

from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.device_parser import _parse_gpu_ids
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO

from callbacks.class_weights import ClassWeights
from callbacks.confusion import Confusion
from callbacks.divergence_guard import DivergenceGuard
from callbacks.exact_resume import ExactResume, SavedPrecision
from callbacks.graceful_stop import GracefulStop
from callbacks.lr_curve import Curve, LearningRateCurve
from callbacks.no_profiler import NoProfiler
from callbacks.out_of_distribution import FitOutOfDistribution
from callbacks.patience import Patience
from callbacks.prediction_writer import PredictionWriter
from callbacks.processes import Processes
from callbacks.progress import EpochProgress
from callbacks.run_folder import OUTPUTS, RunCheckpoint, RunFolder, RunLogger
from callbacks.run_record import RunRecord
from callbacks.speed import Speed
from callbacks.temperature import Temperature
from callbacks.tensorboard.mistakes import MistakesExplained
from callbacks.tensorboard.pictures import TensorBoardPictures
from checkpoints.writing import AtomicCheckpointIO
from errors import UserError
from launch.start import Start, how_to_continue

# What Lightning calls in each training step.
STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class RunCallbacks:
    """The callbacks of a run, by the names under which it uses them afterwards.

    Args:
        start: Where the run starts.
        processes: The callback that watches the run's other processes.
    """

    def __init__(self, start: Start, processes: Processes) -> None:
        self.start = start
        self.processes = processes
        self.folder = RunFolder(start.recipe, start.folder, start.command.then_test, start.command.arguments)
        self.best = RunCheckpoint(self.folder, "best", monitor="val/accuracy", mode="max")
        self.last = RunCheckpoint(self.folder, "last", same_as=self.best)
        self.speed = Speed()
        self._saving: list[RunCheckpoint] = []

    def trainer_arguments(
        self, config: Namespace, built: Namespace, text: str, model: Any, data: Any, curve: Curve | None
    ) -> dict[str, Any]:
        """What the Trainer is given besides the user's settings.

        Args:
            config: The resolved configuration.
            built: The same with its objects built.
            text: The same as YAML.
            model: The classifier.
            data: The data module.
            curve: What `--lr auto` measured.
        """
        command = self.start.command
        self.confusion = Confusion(data.class_names)
        self.predictions = PredictionWriter(OUTPUTS, data.class_names)
        callbacks = [SavedPrecision(), *_listed(built.trainer.callbacks)]
        logger: Any = False
        if command.subcommand == "fit":
            logger = built.trainer.logger
            self.folder.log_dir = Path(command.log_dir)
            if logger in (None, True):
                logger = RunLogger(self.folder, self.start.recipe)
            callbacks = [self.folder, *callbacks, *self._of_fit(config, text, model, data, logger)]
            if command.find_lr:
                callbacks.append(LearningRateCurve(curve, self.folder))
        elif command.subcommand != "predict":
            callbacks.append(self.confusion)
        elif not command.images:
            callbacks += [self.predictions, *([self.confusion] if command.gradcam else [])]
        own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if config.trainer.enable_progress_bar is not False and not own_bar:
            callbacks.append(EpochProgress(self.speed))
        last = self.last if self.last in callbacks else None
        self.stop = GracefulStop(
            self.processes, last, lambda path: how_to_continue(command, config, path), command.then_test
        )
        callbacks += [self.processes, ExactResume(self.speed), self.stop]  # last, so that they see what the others did
        _leave_out_empty_hooks(callbacks)
        plugins = _listed(built.trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        arguments = {"logger": logger, "callbacks": callbacks, "plugins": plugins, "enable_model_summary": False}
        if torch.cuda.is_available() and config.trainer.benchmark is None and not config.trainer.deterministic:
            arguments["benchmark"] = True
        if built.trainer.profiler is None:
            arguments["profiler"] = NoProfiler()
        return arguments

    def _of_fit(self, config: Namespace, text: str, model: Any, data: Any, logger: Any) -> list[Callback]:
        callbacks: list[Callback] = [
            self.speed,
            self.confusion,
            RunRecord(
                self.start.recipe, yaml.safe_load(text), text, self.folder, self.speed, self.confusion, self.best
            ),
            Temperature(),
            FitOutOfDistribution(),
        ]
        if logger:
            callbacks.append(LearningRateMonitor())
        if isinstance(next(iter(_listed(logger)), None), TensorBoardLogger):
            callbacks += [TensorBoardPictures(self.confusion, config.histograms), MistakesExplained(self.confusion)]
        if config.trainer.enable_checkpointing is not False:
            # Two callbacks: `save_last` saves only the epochs that are the best so far.
            self._saving = [*([self.best] if validates(config) else []), self.last]
            callbacks += self._saving
        if config.class_weights:
            callbacks.append(ClassWeights())
        classes = model.hparams["num_classes"]
        callbacks.append(DivergenceGuard(self.processes, classes, stop_at_chance=config.stop_at_chance))
        if config.patience:
            if not validates(config):
                off = "val_size" if config.data.val_size == 0 else "trainer.limit_val_batches"
                raise UserError(f"--patience needs validation images: set --{off} above 0")
            callbacks.append(Patience(config.patience, self.speed))
        return callbacks

    def best_checkpoint(self) -> Path | None:
        """The best checkpoint of a trained run: its own, or if nothing was left to train, the one beside which it
        started; None if the run saves none."""
        folders = [folder / "checkpoints" for folder in (self.folder.path, self.start.folder) if folder]
        files = [folder / name for folder in folders for name in (f"{one.filename}.ckpt" for one in self._saving)]
        return next((file for file in files if file.exists()), None)


def validates(config: Namespace) -> bool:
    """Whether the run has validation images and uses them."""
    return config.data.val_size != 0 and config.trainer.limit_val_batches != 0


def precision(trainer: Namespace, asked_for: bool, saved: str | None) -> tuple[str | None, str]:
    """The precision to compute in.

    The one asked for; else that of the checkpoint, which its run keeps; else the recipe's; else bfloat16 where the
    device has instructions for it. A recipe's bf16-mixed becomes 32-true on a CPU or GPU that only imitates bfloat16,
    many times slower.

    Args:
        trainer: The Trainer's settings.
        asked_for: Whether the user gave the precision, by a flag or in a file of settings.
        saved: The precision of the checkpoint's run, if there is one.

    Returns:
        It, and what the log says beside it.
    """
    wanted = (asked_for and trainer.precision) or saved or trainer.precision
    on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if wanted in (None, "bf16-mixed") and on_gpu and _gpus_have_bfloat16(trainer.devices):
        torch.set_float32_matmul_precision("high")  # of what stays in float32, such as Muon's products
        return "bf16-mixed", ""
    of_a_recipe = wanted == "bf16-mixed" and not asked_for
    if of_a_recipe and on_gpu and not _gpus_have_bfloat16(trainer.devices):
        return "32-true", "this GPU has no bfloat16 instructions"
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.accelerator.is_available())
    if wanted == "16-mixed" and not asked_for and on_cpu:  # of a GPU's network; Lightning would imitate bfloat16
        return "bf16-mixed" if cpu_has_bfloat16() else "32-true", "float16 is for GPUs"
    if wanted is None and on_cpu and cpu_has_bfloat16():
        return "bf16-mixed", "--precision 32 for float32"
    if of_a_recipe and on_cpu and not cpu_has_bfloat16():
        return "32-true", "this CPU has no bfloat16 instructions"
    return wanted, ""


def _gpus_have_bfloat16(devices: Any) -> bool:
    """Whether all GPUs that will train compute in bfloat16; `torch.cuda.is_bf16_supported` asks the first alone."""
    try:
        chosen = _parse_gpu_ids(-1 if devices == "auto" else devices, include_cuda=True) or []
    except ValueError:
        raise UserError(
            f"trainer.devices={devices} is not valid: a number of devices was expected, or a list"
        ) from None
    return bool(torch.version.hip) or all(torch.cuda.get_device_properties(gpu).major >= 8 for gpu in chosen)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU computes in bfloat16 instead of imitating it, many times slower."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return True
    arm: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than PyTorch 2.8
    return bool(arm.get("bf16")) and torch.backends.mkldnn.is_available()  # macOS's PyTorch is built without oneDNN


def _leave_out_empty_hooks(callbacks: list[Callback]) -> None:
    """Spare Lightning a hundred calls a step that do nothing: it passes over a hook that can't be called."""
    for callback in callbacks:
        for hook in STEP_HOOKS:
            if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
                setattr(callback, hook, None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []
