"""What Lightning and PyTorch accept but can't do here, refused in one line before anything runs."""

import importlib.util
import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS
from torch.optim.lr_scheduler import ReduceLROnPlateau

from callbacks.divergence_guard import is_overflow
from cli.messages import MADE_OF_SCHEDULES
from cli.recipes import did_you_mean
from errors import RunError, UserError, is_first_process, one_line, print_warning
from launch.memory import is_out_of_memory
from lit_modules import LitClassifier
from lit_modules.schedules import of_length, open_lengths

LEAST = {  # Lightning checks other settings
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 1,
    "gradient_clip_val": 0,
}
INSTEAD: dict[type, str] = {
    LearningRateFinder: "--lr auto, which searches before the run",
    BatchSizeFinder: "--batch_size auto, which searches before the run",
    StochasticWeightAveraging: "callbacks.ema.EMA; its own average is made after the last checkpoint, and lost",
    SpikeDetection: "the project's own check of the loss, which always runs",
    BackboneFinetuning: "callbacks.fine_tuning.FreezeFeatures, which knows these networks' parts",
}
OWN = ("callbacks.", "launch.", "lightning")  # callbacks of other modules may log metrics that nobody knows here
METRICS = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")


def check_trainer_settings(settings: Namespace, subcommand: str) -> None:
    """Refuse Trainer settings that would fail late or change nothing."""
    needed = {"fit": ["limit_train_batches", "max_epochs", "max_steps"], "validate": ["limit_val_batches"]}
    for name in needed.get(subcommand, [f"limit_{subcommand}_batches"]):
        if settings[name] == 0:
            raise UserError(f"trainer.{name}=0 leaves nothing to {subcommand}; raise it, or leave it out")
    for name, least in LEAST.items():
        value = settings[name]
        if value is not None and not least <= value < math.inf:
            raise UserError(f"trainer.{name}={value} must be a finite number, at least {least}")
    try:
        Timer(settings.max_time)
    except (MisconfigurationException, TypeError):
        raise UserError(
            f"trainer.max_time={settings.max_time} is not valid: days:hours:minutes:seconds was expected, 00:01:30:00"
        ) from None
    if settings.val_check_interval == 0:
        raise UserError("trainer.val_check_interval must be above 0; --val_size 0 trains without validation")
    if settings.default_root_dir is not None:
        raise UserError(
            f"trainer.default_root_dir={settings.default_root_dir} would change nothing: "
            "each run has its folder under --log_dir; set that instead"
        )
    if settings.barebones:
        raise UserError(
            "trainer.barebones=true lets Lightning log, save and show nothing, so there would be neither an accuracy "
            "nor a checkpoint; leave it out (python -m benchmarks.trainer_overhead measures the bare Trainer)"
        )
    profiler = getattr(settings.profiler, "class_path", settings.profiler)
    if str(profiler).rpartition(".")[2] in ("xla", "XLAProfiler") and not importlib.util.find_spec("torch_xla"):
        raise UserError(f"trainer.profiler={profiler} needs the package torch_xla, for TPUs; take simple or advanced")
    if (getattr(settings.profiler, "init_args", None) or {}).get("emit_nvtx") and not torch.cuda.is_available():
        raise UserError("trainer.profiler: emit_nvtx needs an NVIDIA GPU; leave it out")


def check_trainer(trainer: Trainer, settings: Namespace, net: nn.Module) -> None:
    """Refuse what only shows once the Trainer is built."""
    if type(trainer.strategy.launcher) is _MultiProcessingLauncher:
        strategy = getattr(settings.strategy, "class_path", settings.strategy)
        raise UserError(
            f"trainer.strategy={strategy} starts the other processes as copies of this one, which is not supported: "
            "set --trainer.strategy ddp, which starts each from scratch"
        )
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise UserError(
            f"{type(trainer.strategy).__name__} gives each process a part of the network, which is not supported, nor "
            "needed for networks of this size: set --trainer.strategy ddp"
        )
    device = trainer.strategy.root_device.type
    if trainer.world_size > 1 and device == "cuda" and not (dist.is_available() and dist.is_nccl_available()):
        raise UserError("several GPUs need NCCL, which PyTorch has not on this system (Windows): set --devices 1")
    several_without_gpu = trainer.world_size > 1 and device != "cuda"
    if _validates_by_time(trainer):
        trainer.val_check_interval = math.inf  # which Lightning then never sets, though it is read
    if trainer.world_size > 1 and _validates_by_time(trainer):  # each process by its own clock
        raise UserError("trainer.val_check_interval can't be a time with several processes: give a share of an epoch")
    if settings.sync_batchnorm and several_without_gpu and any(isinstance(part, _BatchNorm) for part in net.modules()):
        raise UserError(
            "trainer.sync_batchnorm=true needs GPUs: PyTorch's SyncBatchNorm has no CPU version; leave it out"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, instead in INSTEAD.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {kind.__name__} can't work here; take {instead}")
        if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
            raise UserError(
                "trainer.callbacks: save_weights_only leaves out how the network was trained, and averaged weights; "
                "leave it out"
            )


def try_optimizer(model: LitClassifier, names: Namespace, device: torch.device) -> Any:
    """The optimiser, tried on stand-ins for the weights, one for each number of dimensions that they have.

    Args:
        model: The classifier.
        names: The configuration's `model`, for messages.
        device: Where it will train.

    Raises:
        UserError: If it refuses its settings or such weights.
    """
    return _tried("optimizer", names, lambda: _stepped_optimizer(model, device))


def check_training(trainer: Trainer, model: LitClassifier, names: Namespace, validates: bool) -> None:
    """Try optimiser and schedule on stand-ins for the weights; refuse to watch metrics that are not measured.

    Args:
        trainer: The run's Trainer.
        model: Its classifier.
        names: The configuration's `model`, for messages.
        validates: Whether there are images for validation.
    """
    optimizer = try_optimizer(model, names, trainer.strategy.root_device)
    plugin = trainer.precision_plugin
    if isinstance(optimizer, LBFGS) and getattr(plugin, "scaler", None):
        raise UserError("LBFGS can't train in 16-mixed: it takes no scaled gradients; set --precision bf16-mixed or 32")
    clipped = trainer.gradient_clip_val and isinstance(plugin, MixedPrecision)
    if clipped and unfuse(model, optimizer) and trainer.is_global_zero:
        print(f"Clipping gradients in {plugin.precision}: {type(optimizer).__name__} runs without its fused kernel")
    if model.scheduler:
        _check_schedule(trainer, model, names, optimizer, validates)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(monitor := getattr(callback, "monitor", None), str):
            _check_monitor(monitor, getattr(callback, "mode", ""), type(callback).__name__, trainer, validates)
            _check_moment(callback, monitor, trainer)


def unfuse(model: LitClassifier, optimizer: Any) -> bool:
    """Have the model's optimiser made without its fused kernel, if it has one; says whether it has.

    In mixed precision Lightning does not clip what such a kernel may still have to unscale.

    Args:
        model: The classifier.
        optimizer: One that its factory has made.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if fused:
        make: Any = model.optimizer
        model.optimizer = partial(make, fused=False)
    return fused


def _stepped_optimizer(model: LitClassifier, device: torch.device) -> Any:
    weights = [weight for weight in model.parameters() if not is_lazy(weight)]
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(f"model.net: {type(model.net).__name__} has no weights to train; name a network of layers")
    stand_ins = [nn.Parameter(torch.ones((2,) * count, device=device)) for count in {weight.ndim for weight in weights}]
    optimizer: Any = model.optimizer(stand_ins)
    if model.hparams["channels_last"] and not isinstance(optimizer, LBFGS):
        for weight in stand_ins:
            if weight.ndim == 4:
                weight.data = weight.data.to(memory_format=torch.channels_last)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.stack([weight.square().sum() for weight in stand_ins]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.state_dict()  # for the checkpoints
    return optimizer


def _check_schedule(trainer: Trainer, model: LitClassifier, names: Namespace, optimizer: Any, validates: bool) -> None:
    scheduler, name = model.scheduler, _name("scheduler", names)
    assert scheduler is not None
    by_step = model.hparams["scheduler_interval"] == "step"
    if open_lengths(scheduler) and trainer.max_epochs in (None, -1) and not (by_step and trainer.max_steps > 0):
        raise UserError(
            f"{name} is as long as the run, and this run has no end: give --max_epochs"
            f"{' or --trainer.max_steps' if by_step else ''}, or train without a schedule (--model.scheduler null)"
        )

    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    changed = any(isinstance(one, GradientAccumulationScheduler) for one in callbacks)
    if changed and open_lengths(scheduler) and (by_step or trainer.max_steps > 0):
        raise UserError(
            f"{name} is as long as the run, whose steps GradientAccumulationScheduler changes: give the length "
            f"(--model.scheduler.{open_lengths(scheduler)[0]}), or --trainer.accumulate_grad_batches instead"
        )

    def tried() -> Any:
        schedule: Any = of_length(scheduler, optimizer, 1_000)
        schedule.step(*([1.0] if isinstance(schedule, ReduceLROnPlateau) else []))
        schedule.state_dict()  # for the checkpoints
        return schedule

    schedule = _tried("scheduler", names, tried)
    if not isinstance(schedule, ReduceLROnPlateau):
        return
    if by_step:
        raise UserError(f"{name} follows a metric that is measured once an epoch: set --model.scheduler_interval epoch")
    monitor = getattr(schedule, "monitor", "val/loss")
    _check_monitor(monitor, schedule.mode, name, trainer, validates)
    if monitor.startswith("val/") and trainer.check_val_every_n_epoch is None:
        raise UserError(f"{name} watches {monitor} after each epoch: leave out trainer.check_val_every_n_epoch=null")
    if monitor.startswith("val/") and _validates_by_time(trainer):
        raise UserError(f"{name} watches {monitor} after each epoch: trainer.val_check_interval can't be a time")


def _validates_by_time(trainer: Trainer) -> bool:
    return getattr(trainer, "_val_check_time_interval", None) is not None  # kept nowhere else


def _check_monitor(monitor: str, mode: str, owner: str, trainer: Trainer, validates: bool) -> None:
    if monitor.startswith("val/") and not validates:
        raise UserError(
            f"{owner} watches {monitor}, and nothing is validated: set --val_size above 0, or watch train/loss"
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    strangers = [callback for callback in callbacks if not type(callback).__module__.startswith(OWN)]
    known = [*METRICS, "train/loss_step"]
    if monitor not in known and not strangers:  # which may log anything
        hint = did_you_mean(monitor, known) or f"; there are {', '.join(METRICS)}"
        raise UserError(f"{owner} watches {monitor}, which is not measured{hint}")
    if monitor in METRICS and mode == "min" and monitor.endswith("accuracy") and is_first_process():
        print_warning(f"{owner} takes a rising {monitor} for worse: its mode is min; set mode max")


def _check_moment(callback: Callback, monitor: str, trainer: Trainer) -> None:
    """Refuse what looks at a metric before it is known: `train/*` within an epoch, `val/*` where none was measured."""
    name = {ModelCheckpoint: "save_on_train_epoch_end", EarlyStopping: "check_on_train_epoch_end"}.get(type(callback))
    if name is None or monitor not in METRICS:  # train/loss_step, say, is known in an epoch
        return
    every: Any = trainer.check_val_every_n_epoch
    after_epoch = getattr(callback, f"_{name}")
    if after_epoch is None:  # as Lightning decides it
        after_epoch = every == 1 and trainer.val_check_interval == 1.0
    if monitor.startswith("train/") and not after_epoch:
        hint = f"at each validation, and it is known when an epoch has ended: set its {name} to true"
        raise UserError(f"{type(callback).__name__} watches {monitor} {hint}")
    looks = getattr(callback, "every_n_epochs", 1)  # after so many epochs
    if monitor.startswith("val/") and after_epoch and (_validates_by_time(trainer) or not every or looks % every):
        hint = f"after epochs that may not be validated: leave out its {name}"
        raise UserError(f"{type(callback).__name__} watches {monitor} {hint}")


def _tried(setting: str, names: Namespace, trial: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the order of steps, which differs from training
            return trial()
    except UserError:
        raise
    except Exception as error:  # of a class from anywhere
        if is_overflow(error) or is_out_of_memory(error):
            raise  # launch/run.py says what to do
        refuse_broken_gpu(error)
        name = _name(setting, names)
        if "has no len()" in str(error) or name.endswith("ChainedScheduler"):
            raise UserError(f"{name} {MADE_OF_SCHEDULES}") from None
        reason = one_line(str(error)) or type(error).__name__
        channels = " (--model.channels_last false may help)" if "view size is not compatible" in str(error) else ""
        raise UserError(f"{name} can't be used with these settings: {reason}{channels}") from None


def refuse_broken_gpu(error: Exception) -> None:
    """Raise `RunError` if it is the GPU that fails, whatever was computed on it: too old, taken, without its driver."""
    of_a_program = re.search("device-side assert|illegal memory access|misaligned address", str(error))
    if isinstance(error, RuntimeError) and re.search(r"\b(CUDA|NVIDIA|HIP) ", str(error)) and not of_a_program:
        reason = one_line(str(error))[:200]
        raise RunError(f"the GPU can't be used: {reason}; --accelerator cpu does without it") from None


def _name(setting: str, names: Namespace) -> str:
    return str(getattr(names[setting], "class_path", f"model.{setting}"))
