"""SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP end training with a checkpoint from which it continues exactly."""

import math
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Timer, WeightAveraging
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.processes import Processes
from callbacks.run_folder import RunCheckpoint
from callbacks.signal_watch import BEFORE_TRAINING
from errors import SIGNALS, Stopped, print_warning, signal_name, stopped_code

FIRST_BATCH = 30.0  # seconds to wait for the first batch, as nobody knows yet how long one takes


class GracefulStop(Callback):
    """Saves `last.ckpt` after the current batch and raises `Stopped`; a second Ctrl-C ends the process at once.

    The handlers only note the signal; after each batch the processes agree on whether one of them was asked to stop.
    So it does not matter which processes get the signal. Batches that are still being accumulated are finished first.
    Outside of training there is nothing to save: testing ends at once, after training with how to continue.

    Under SLURM, SIGUSR1 (or the signal that the `SLURMEnvironment` was made with) then also requeues the job, which
    launch/start.py lets continue from `last.ckpt`. (Lightning's own handler would save a second checkpoint, where a job
    that was requeued does not look for it.)

    Args:
        processes: The callback that lets the processes agree.
        last: The callback that saves `last.ckpt`; None if nothing is saved.
        how_to_continue: From the path of the checkpoint to the command that continues from it.
        then_test: Whether a test follows the training.
    """

    def __init__(
        self, processes: Processes, last: RunCheckpoint | None, how_to_continue: Callable[[Path], str], then_test: bool
    ) -> None:
        self._processes = processes
        self._last = last
        self._how_to_continue = how_to_continue
        self._then_test = then_test
        self._complete = f"Training is complete{', and was stopped before testing' if then_test else ''}."
        self._handlers_before: dict[int, Any] = {}
        self._requeue_signal: int | None = None
        self._signal = 0
        self._tell = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Handle the signals; outside of training there is nothing to save, and they end the process at once."""
        self._tell = trainer.is_global_zero
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal
        handler = self._take_note if stage == TrainerFn.FITTING else self._processes.raise_at_once
        self._handle(handler)
        # Lightning's own handler talks to the other processes, which may be busy elsewhere: that hangs.
        connector: Any = trainer._signal_connector
        connector._sigterm_notifier_fn = handler

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that a run that is continued has used up its time: Lightning's Timer ends it without a word."""
        left = [timer.time_remaining() for timer in trainer.callbacks if isinstance(timer, Timer)]  # type: ignore[attr-defined]
        if self._tell and any(seconds is not None and seconds <= 0 for seconds in left):
            print_warning("trainer.max_time is over, counted from this run's beginning; a longer one trains it further")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals back from Lightning, which has set its own handlers for SLURM."""
        self._processes.watch.patience = FIRST_BATCH * trainer.accumulate_grad_batches
        self._handle(self._take_note)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the former handlers."""
        self._processes.watch.patience = BEFORE_TRAINING
        for signum, handler in self._handlers_before.items():
            signal.signal(signum, handler)
        self._handlers_before = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if asked to; as the last callback, so that the others' state is saved as of this batch."""
        if trainer.fit_loop._should_accumulate():
            return
        self._processes.watch.progress()
        if signum := self._processes.largest(self._signal):
            self._save_and_stop(trainer, signum, f"epoch {trainer.current_epoch + 1}, batch {batch_idx + 1}")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Stop if asked to; the whole validation is then repeated."""
        self._processes.watch.progress()
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if signum := self._processes.largest(self._signal):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # put the training weights back, which validation swaps out
                    callback.on_validation_epoch_end(trainer, pl_module)
            self._save_and_stop(trainer, signum, f"the validation of epoch {trainer.current_epoch + 1}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let writing a checkpoint take as long as it does; after the next batch the wait is limited again."""
        self._processes.watch.patience = math.inf

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if a signal came after the last check."""
        if signum := self._processes.largest(self._signal):
            self._stop(trainer, signum, self._complete, self._file() if self._then_test else None)

    @contextmanager
    def around_test(self, trainer: pl.Trainer) -> Iterator[None]:
        """Around the test that follows training: stop if a signal came while training was wound up, or comes now.

        Raises:
            Stopped: With how to continue, too.
        """
        self.on_train_end(trainer, trainer.lightning_module)
        try:
            yield
        except Stopped as stopped:
            message = self._complete + self._continue_with(self._file())
            raise Stopped(message if str(stopped) else "", stopped.exit_code) from None

    def _file(self) -> Path | None:
        return self._last.file if self._last else None

    def _handle(self, handler: Callable[[int, Any], None]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in {*SIGNALS, *([self._requeue_signal] if self._requeue_signal else [])}:
            if signum == getattr(signal, "SIGHUP", None) and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # under nohup
            before: Any = signal.signal(signum, handler)
            self._handlers_before.setdefault(signum, before)

    def _take_note(self, signum: int, frame: Any) -> None:
        if not self._signal:  # the watch handles a second one
            self._signal = signum
            if self._tell and signum == signal.SIGINT:
                again = b"; press Ctrl-C again to stop at once" if os.name == "posix" else b""  # where it is watched
                with suppress(OSError):  # nobody reads it: Ctrl-C ends `| tee log` too
                    os.write(2, b"\nSaving a checkpoint after this batch" + again + b".\n")

    def _save_and_stop(self, trainer: pl.Trainer, signum: int, where: str) -> None:
        path = self._file()
        self._processes.watch.patience = math.inf
        if path:
            trainer.save_checkpoint(path)
        saved = f"Saved: {path}" if path else "Nothing was saved: checkpoints are switched off."
        self._stop(trainer, signum, f"Stopped by {signal_name(signum)} in {where}. {saved}", path)

    def _continue_with(self, path: Path | None) -> str:
        return f"\nContinue with: {self._how_to_continue(path)}" if path else ""

    def _stop(self, trainer: pl.Trainer, signum: int, message: str, path: Path | None) -> None:
        self._processes.watch.patience = math.inf  # it has answered
        if signum == self._requeue_signal and path:
            message += f" {_requeue() if trainer.is_global_zero else ''}"
            self._processes.largest(0)  # wait: if one task ends early, srun may kill the others, and with them scontrol
        else:
            message += self._continue_with(path)
        self._processes.end_with_parent()
        raise Stopped(message if trainer.is_global_zero else "", stopped_code(signum))


def _requeue() -> str:
    """Have SLURM start this job again; says whether it does."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        fault = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        fault = str(error)
    return f"The job could not be requeued: {fault}" if fault else "The job was requeued."
