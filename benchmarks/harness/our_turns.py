"""train.py as a contestant: the real command, with one more callback that waits for its turns."""

import atexit
import shutil
import sys
import tempfile
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from benchmarks.harness.side_by_side import Turns

EPOCHS = 100_000  # longer than any contest
RETURN_MEMORY = "--return_memory"


class StepTurns(Callback):
    """Takes turns between steps; the rate is images per second, with everything between two steps included."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first turn."""
        self._turns = Turns(trainer.strategy.root_device.type)
        self._turns.wait()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step."""
        self._turns.step(len(batch[1]))


class EpochTurns(StepTurns):
    """A turn is an epoch, with validation, logging and checkpoints; the step counted is the whole epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The previous epoch, and everything that followed it, is over."""
        if trainer.current_epoch:
            self._turns.step(len(trainer.datamodule.train_set))  # type: ignore[attr-defined]

    def on_train_batch_end(self, *_: Any) -> None:
        """A step is not counted."""


def float32(device: str) -> list[str]:
    """Flags for train.py beside a loop in float32: on a CPU its default depends on the instructions."""
    return ["--precision", "32-true"] if device == "cpu" else []


def command(turns: type[Callback], options: Any, *arguments: str, keep_freed_memory: bool = True) -> list[str]:
    """Python's arguments for train.py as a contestant on one device, its runs in a folder that is removed.

    Args:
        turns: The callback that waits for its turns.
        options: What side_by_side.Parser has parsed.
        arguments: Further ones of train.py.
        keep_freed_memory: False leaves the C library's handling of memory as it is.
    """
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    start = ["-m", "benchmarks.harness.our_turns", *([] if keep_freed_memory else [RETURN_MEMORY])]
    length = ["--max_epochs", str(EPOCHS), "--log_dir", folder, f"--trainer.callbacks+={__name__}.{turns.__name__}"]
    return [*start, "fit", *options.single, *length, *arguments]


if __name__ == "__main__":
    import train
    from launch import memory

    arguments = sys.argv[1:]
    if arguments[0] == RETURN_MEMORY:
        memory.keep_freed_memory = lambda: False
        arguments = arguments[1:]
    sys.exit(train.main(arguments))
