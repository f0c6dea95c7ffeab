"""train.py as a contestant: the real command, with one more callback that waits for its turns."""

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from benchmarks.harness.side_by_side import Turns

RETURN_MEMORY = "--return_memory"


class StepTurns(Callback):
    """Takes turns between steps; the rate is images per second, with everything between two steps included."""

    def __init__(self) -> None:
        self._turns: Turns | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first turn."""
        self._turns = _take_part(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step."""
        assert self._turns is not None
        self._turns.step(len(batch[1]))


class EpochTurns(Callback):
    """A turn is an epoch, with validation, logging and checkpoints; the step counted is the whole epoch."""

    def __init__(self) -> None:
        self._turns: Turns | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The previous epoch, and everything that followed it, is over."""
        if self._turns is None:
            self._turns = _take_part(trainer)
        else:
            self._turns.step(len(trainer.datamodule.train_set))  # type: ignore[attr-defined]


def command(turns: type[Callback], *arguments: str, keep_freed_memory: bool = True) -> list[str]:
    """Python's arguments for train.py with these arguments as a contestant.

    Args:
        turns: The callback that waits for its turns.
        arguments: Of train.py, after `fit`.
        keep_freed_memory: False leaves the C library's handling of memory as it is.
    """
    start = ["-m", "benchmarks.harness.our_turns", *([] if keep_freed_memory else [RETURN_MEMORY])]
    return [*start, "fit", *arguments, f"--trainer.callbacks+={__name__}.{turns.__name__}"]


def _take_part(trainer: pl.Trainer) -> Turns:
    turns = Turns(trainer.strategy.root_device.type, warm_up=_WARM_UP)
    turns.wait()
    return turns


_WARM_UP = 0.3

if __name__ == "__main__":
    import train
    from launch import memory

    arguments = sys.argv[1:]
    if arguments[0] == RETURN_MEMORY:
        memory.keep_freed_memory = lambda: False
        arguments = arguments[1:]
    sys.exit(train.main(arguments))
