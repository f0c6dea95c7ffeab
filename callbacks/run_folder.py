"""A folder for each run, and the run's own checkpoints in it."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import Timeout
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter

from checkpoints.writing import AtomicCheckpointIO
from datamodules import DatasetError
from datamodules.files.finding import locked
from errors import UserError, print_warning, shown

OUTPUTS = Path("outputs")  # of predict; compare.py's pictures lie there too
IN_USE = 5  # seconds to wait for a run's folder: the workers of a killed run hold its lock a little longer
_LOCKS: dict[Path, ExitStack] = {}  # of the folders in which this process trains; no part of what is pickled
SLURM_JOB = "slurm_job"  # in the run's folder: job and command; launch/start.py finds a requeued job's run by it


class RunFolder(Callback):
    """The run's own folder, `LOG_DIR/RECIPE/version_N`, whatever logger it has; it must be the first callback.

    The first process claims it by making it, which succeeds for one of several runs that start at once.

    Args:
        recipe: Name of the recipe.
        start: Folder of the run that is continued; None for a new one.
        then_test: Whether training is followed by a test, whose results come into the folder too.
        arguments: The command line, by which a requeued job tells its runs apart.

    Attributes:
        log_dir: Folder of all runs.
        path: The run's folder; None before training starts, and if nothing is to be kept (`fast_dev_run`).
        is_here: Whether it was on this machine's disk when training started.
    """

    def __init__(self, recipe: str, start: Path | None, then_test: bool = False, arguments: Sequence[str] = ()) -> None:
        self.log_dir = Path()
        self.path: Path | None = None
        self._recipe = recipe
        self._start = start
        self._then_test = then_test
        self._arguments = list(arguments)
        self._is_new = self.is_here = False

    def claim(self) -> Path:
        """The folder, created if needed; only for the first process."""
        if self.path is None:
            # Absolute, or a run that is continued from another working folder would forget its best epoch.
            parent, start = self.log_dir.resolve() / self._recipe, self._start and self._start.resolve()
            if start and start.parent == parent and _number(start, "version") is not None:
                self.path = start
            else:
                self.path, self._is_new = next_folder(parent, "version"), True
                if start:
                    print_warning(
                        f"the run goes on in {shown(self.path)}, not in {shown(start)}, where its best epoch so far "
                        "stays behind"
                    )
            self._lock_it()
            if job := os.environ.get("SLURM_JOB_ID"):
                (self.path / SLURM_JOB).write_text(json.dumps([job, self._arguments]), encoding="utf-8")
        return self.path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Claim the folder, and tell the other processes."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = str(self.claim()) if trainer.is_global_zero else ""
        self.path = Path(trainer.strategy.broadcast(folder))
        self.is_here = self.path.exists()
        trainer._default_root_dir = str(self.path)  # type: ignore[attr-defined]  # where the user's own callbacks write

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no folder behind of a run that was refused before its first step."""
        self._unlock()
        if self._is_new and self.path and type(exception) in (UserError, DatasetError) and not trainer.global_step:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # others have runs there
                for folder in self.path.parents[: len(Path(self._recipe).parts) + 1]:  # up to log_dir
                    folder.rmdir()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let another process train in the folder."""
        if stage != "fit" or not self._then_test:
            self._unlock()

    def _lock_it(self) -> None:
        """Two processes that train in one folder would replace each other's checkpoints and records."""
        assert self.path is not None
        held = ExitStack()
        try:
            held.enter_context(locked(self.path / ".lock", IN_USE))
        except Timeout:
            folder, file = shown(self.path), shown(self.path / ".lock")
            hint = f"wait for it, stop it, or leave --ckpt_path out; if there is none, remove {file}"
            raise UserError(f"another process is training in {folder}; {hint}") from None
        _LOCKS[self.path] = held

    def _unlock(self) -> None:
        if self.path in _LOCKS:
            _LOCKS.pop(self.path).close()


class RunLogger(TensorBoardLogger):
    """TensorBoard's logs in the run's folder.

    TensorBoard draws what several folders log under one tag in one chart. So `train/loss` and `val/loss` become
    `curves/loss` in the sub-folders `train` and `val`; what belongs to no stage stays in the run's folder.
    """

    def __init__(self, folder: RunFolder, recipe: str) -> None:
        super().__init__(folder.log_dir.resolve(), recipe, default_hp_metric=False)
        self._folder = folder
        self._stages: dict[str, SummaryWriter] = {}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log each metric where its name says."""
        for name, value in metrics.items():
            stage, _, metric = name.partition("/")
            if stage in ("train", "val", "test"):
                if stage not in self._stages:
                    self._stages[stage] = SummaryWriter(f"{self.log_dir}/{stage}")
                self._stages[stage].add_scalar(f"curves/{metric}", value, step)
            elif name != "epoch":  # Lightning's, a staircase
                super().log_metrics({name.replace("lr-", "learning_rate/", 1): value}, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the files; whoever logs again opens new ones."""
        super().finalize(status)
        for writer in self._stages.values():
            writer.close()

    @property
    def version(self) -> int:
        """N of the folder's name; only the first process, which alone writes, is asked before all know it."""
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        folder = self._folder.path or (self._folder.claim() if first else None)
        return (_number(folder, "version") if folder else None) or 0


class RunCheckpoint(ModelCheckpoint):
    """One checkpoint of fixed name in the run's folder, which does not collide with the user's `ModelCheckpoint`s.

    Args:
        folder: The run's folder.
        name: Name of the file, without its ending.
        same_as: A callback that comes before this one; what it has just saved is not written a second time.
        settings: As for `ModelCheckpoint`.
    """

    def __init__(self, folder: RunFolder, name: str, same_as: "RunCheckpoint | None" = None, **settings: Any) -> None:
        super().__init__(filename=name, enable_version_counter=False, **settings)
        self._folder = folder
        self._same_as = same_as
        self._is_there = False
        self._validated: int | None = None

    @property
    def file(self) -> Path | None:
        """The checkpoint; None before training starts, and if nothing is saved."""
        return self._folder.path and self._folder.path / "checkpoints" / f"{self.filename}.ckpt"

    @property
    def _legacy_state_key(self) -> Any:
        """The name of this callback in checkpoints of earlier versions."""
        return self.state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Use the run's folder."""
        if self.file:
            self.dirpath = str(self.file.parent)
            self._is_there = trainer.strategy.broadcast(self.file.exists())
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score over, if its checkpoint lies here; paths in the file from which training goes on count
        for nothing."""
        score = state_dict.get("best_model_score")
        if self._is_there and isinstance(score, torch.Tensor) and score.numel() == 1:
            path = str(self.file)
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = score
            self.best_k_models = {path: score}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, if it is better than before."""
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def not_validated(self, trainer: pl.Trainer) -> int:
        """How many steps of the run came after its last validation; 0 without any."""
        return 0 if self._validated is None else trainer.global_step - self._validated

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; what watches no metric does so after every epoch, where Lightning's waits for a validation."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.monitor is not None:
            return
        if not self._should_save_on_train_epoch_end(trainer):
            self._last_global_step_saved = 0  # in a validation, before the epoch was over
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        same, files = self._same_as, trainer.strategy.checkpoint_io
        saved = same and same._last_global_step_saved == trainer.global_step
        at_the_end = same and same._should_save_on_train_epoch_end(trainer)  # or this one may be saved in another place
        if same and saved and at_the_end and isinstance(files, AtomicCheckpointIO):
            linked = trainer.is_global_zero and files.link_checkpoint(same._last_checkpoint_saved, filepath)
            if trainer.strategy.broadcast(linked):
                self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
                for logger in trainer.loggers if trainer.is_global_zero else ():
                    logger.after_save_checkpoint(self)
                return
        super()._save_checkpoint(trainer, filepath)


def next_folder(parent: Path, name: str) -> Path:
    """Make the folder NAME_N with the next free number, which no other process gets.

    Raises:
        UserError: If the folder above it can't be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{shown(parent)} can't be written: {error.strerror}") from None
    number = max((found for path in parent.iterdir() if (found := _number(path, name)) is not None), default=-1) + 1
    while True:
        try:
            (parent / f"{name}_{number}").mkdir(parents=True)  # another run, refused, may have removed the empty parent
            return parent / f"{name}_{number}"
        except FileExistsError:
            number += 1


def _number(folder: Path, name: str) -> int | None:
    digits = folder.name.removeprefix(f"{name}_")
    return int(digits) if folder.name.startswith(f"{name}_") and digits.isdecimal() else None
