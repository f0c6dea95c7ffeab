"""What a run shows while it works: one live line on a terminal, and one line after each epoch everywhere."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from callbacks.speed import Speed

_DRAWINGS_A_SECOND = 2  # each holds up the training for milliseconds
# Fields of an epoch's line, the first to go where a terminal is too narrow for all.
_LEAST_IMPORTANT = ("lr", "images/s", "train accuracy", "seconds", "train loss", "val loss")


class EpochProgress(ProgressBar):
    """Shows epoch, bar, loss, speed and time left in one line, which is replaced by a line with the epoch's results.

    If standard output is not a terminal (pipes, files, CI), only the epochs' lines are printed.

    Args:
        speed: The callback that measures the epoch; it must come before this one.
    """

    def __init__(self, speed: Speed) -> None:
        super().__init__()
        self._speed = speed
        self._enabled = True
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._drawn = 0.0
        self._lr = 0.0

    def disable(self) -> None:
        """Called by the Trainer on all processes but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the bar of an epoch that is continued, which has no start of its own, and perhaps no step left."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        if trainer.fit_loop.restarted_mid_epoch:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the learning rate that the step is done with."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the epoch's bar."""
        self._begin(f"epoch {trainer.current_epoch + 1}{_of(trainer.max_epochs)}", self.total_train_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar when it is due: doing so at every step would slow small networks down."""
        if self._is_due(last=trainer.is_last_batch):
            loss = trainer.callback_metrics.get("train/loss_step")
            texts = [] if loss is None else [f"loss {loss:.4f}"]
            self._move(batch_idx + 1, "  ".join([*texts, f"{self._speed.so_far():,.0f} images/s"]))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the bar of a validation that is not part of an epoch."""
        if not trainer.training and not trainer.sanity_checking and self._bar is None:
            self._begin("validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Show that it is validating, or move the bar of a validation alone."""
        self._evaluated("validating" if trainer.state.fn == "fit" else "")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the test's bar."""
        self._begin("test", sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Move it."""
        self._evaluated()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the prediction's bar."""
        self._begin("prediction", sum(trainer.num_predict_batches))

    on_predict_batch_end = on_test_batch_end

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch's line."""
        metrics = self._speed.measured(trainer)  # on all processes: reading them may need all
        if not self._enabled:
            return
        self._end()
        fields = {"epoch": f"epoch {trainer.current_epoch + 1}{_of(trainer.max_epochs)}"}
        for stage in ("train", "val"):
            if f"{stage}/loss" in metrics:
                fields[f"{stage} loss"] = f"  {stage} loss {metrics[f'{stage}/loss']:.4f}"
                fields[f"{stage} accuracy"] = f" accuracy {metrics[f'{stage}/accuracy']:.4f}"
        fields["lr"] = f"  lr {self._lr:.2e}"
        fields["images/s"] = f"  {self._speed.images_per_second:,.0f} images/s"
        fields["seconds"] = f"  {self._speed.epoch_seconds:.1f} s"
        for name in _LEAST_IMPORTANT if sys.stdout.isatty() else ():
            if len("".join(fields.values())) > self._console.width:
                fields.pop(name, None)
        print("".join(fields.values()), flush=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the bar, so that what is printed next has its own line."""
        self._end()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the bar of a finished stage."""
        self._end()

    def _begin(self, what: str, total: float) -> None:
        self._end()
        if not self._enabled or not sys.stdout.isatty():
            return
        text, left = TextColumn("{task.fields[text]}"), (TimeRemainingColumn(compact=True), TextColumn("left"))
        columns = (TextColumn("{task.description}"), BarColumn(None), text, *left)
        # Drawn without Rich's own thread, which would take time from the training.
        self._bar = Progress(*columns, console=self._console, transient=True, expand=True, auto_refresh=False)
        self._batches = 0
        self._bar.add_task(what, total=total if total != float("inf") else None, text="")
        self._bar.start()
        self._bar.refresh()

    def _move(self, done: int, text: str) -> None:
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, text=text)
            self._bar.refresh()

    def _evaluated(self, text: str = "") -> None:
        """Within an epoch only the text changes; else count the batches."""
        if self._bar is None:
            return
        task = self._bar.tasks[0]
        if text:
            if self._is_due(last=False):
                self._move(int(task.completed), text)
            return
        self._batches += 1
        if self._is_due(last=self._batches == task.total):
            self._move(self._batches, "")

    def _end(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _is_due(self, last: bool) -> bool:
        now = time.monotonic()
        if self._bar is None or (not last and now - self._drawn < 1 / _DRAWINGS_A_SECOND):
            return False
        self._drawn = now
        return True


def _of(epochs: int | None) -> str:
    return f"/{epochs}" if epochs and epochs > 0 else ""
