"""The processes of one run: what they agree on, and what happens when one of them is gone."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback

from errors import print_error

POLL_SECONDS = 0.5
# How long a process whose connection broke waits to be told, or to see, which process was lost.
GRACE_SECONDS = 20.0


class Processes(Callback):
    """Watches the other processes that `--devices` started on this machine, and ends this one when they are gone.

    Lightning's own observer ends them without a word. (Processes that torchrun or SLURM started are watched by them.)
    """

    def __init__(self) -> None:
        self._children: list[subprocess.Popen] = []
        self._watch: threading.Thread | None = None
        self._stop_watching = threading.Event()
        self._group: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start to watch."""
        if trainer.world_size == 1:
            return
        if self._group is None and dist.is_available() and dist.is_initialized():
            # Through gloo, so that agreeing does not wait for a GPU.
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if not isinstance(environment, LightningEnvironment) or self._watch:
            return
        if environment.local_rank() > 0:
            self._start(self._watch_parent, os.getppid(), trainer.local_rank, trainer.global_rank)
            return
        procs = getattr(trainer.strategy.launcher, "procs", [])
        self._children += procs
        procs.clear()  # the observer has nothing left to observe
        if self._children:
            self._start(self._watch_children, trainer.global_rank)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching: the processes end in any order."""
        self.ignore_ends()

    def ignore_ends(self) -> None:
        """Stop watching."""
        self._stop_watching.set()
        if self._watch and self._watch is not threading.current_thread():
            self._watch.join()  # a thread that is alive when Python ends may bring it down
        self._watch = None

    def largest(self, value: int) -> int:
        """The largest of the processes' values; all must ask at the same moment."""
        if self._group is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group)
        return int(tensor)

    def kill_children(self) -> None:
        """End the processes that this one started, at once."""
        self.ignore_ends()
        for child in self._children:
            if child.poll() is None:
                with suppress(OSError):
                    child.kill()

    def await_loss(self) -> None:
        """Called when a connection broke: wait for the watch to end this process with its line."""
        if self._watch:
            self._watch.join(GRACE_SECONDS)

    def _start(self, watch: Callable, *args: int) -> None:
        self._stop_watching.clear()
        self._watch = threading.Thread(target=watch, args=args, daemon=True, name="process-watch")
        self._watch.start()

    def _watch_children(self, rank: int) -> None:
        while not self._stop_watching.wait(POLL_SECONDS):
            for number, child in enumerate(self._children, rank + 1):
                if child.poll():
                    self.kill_children()
                    _end_with_line(f"process {number} {_ending(child.returncode)}; the others were ended")

    def _watch_parent(self, parent: int, local_rank: int, rank: int) -> None:
        while not self._stop_watching.wait(POLL_SECONDS):
            if os.getppid() != parent:
                if local_rank > 1:
                    os._exit(1)  # one line is enough
                _end_with_line(f"process {rank - local_rank} is gone; the others were ended")


def end_process(exit_code: int) -> None:
    """End one of several processes without Python's own clean-up; return where there is only one.

    During that clean-up a process that had done its work was now and then brought down with "terminate called without
    an active exception", as C++ says when a thread is still running: most likely one of the connection's.
    """
    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _ending(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _end_with_line(message: str) -> None:
    print_error("train.py", f"{message}; continue from the last checkpoint with --ckpt_path last")
    os._exit(1)  # the main thread may hang in a collective call
