"""The processes of one run: what they agree on, and what happens when one of them dies."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback

from callbacks.signal_watch import SignalWatch
from errors import SIGNALS, Stopped, is_first_process, print_error, signal_name, stopped_code

POLL_SECONDS = 0.5
STARTED_BY = "CLASSIC_CNNS_STARTED_BY"  # where the first process leaves its number for those that it starts
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
# How long a process whose connection broke waits to learn which process was lost.
GRACE_SECONDS = 20.0


class Processes(Callback):
    """Watches the other processes that `--devices` started on this machine, and ends this one when they die.

    Lightning's own observer ends them without a word. (Processes that torchrun or SLURM started are watched by them.)
    """

    def __init__(self) -> None:
        self.watch = SignalWatch(self._end_at_once, self._take_children)
        self.launcher: Any = None  # Lightning's, which starts the children
        self._parent = 0
        self._first = 0  # global rank of the first process on this machine
        self._children: list[subprocess.Popen] = []
        self._watch: threading.Thread | None = None
        self._stop_watching = threading.Event()
        self._group: Any = None

    def begin(self) -> None:
        """Watch the parent, if a process of this run started this one; handle the signals."""
        if _is_child():
            # On Windows the parent is a virtual environment's launcher, which has started Python as its child.
            self._parent = os.getppid() if os.name == "nt" else int(os.environ[STARTED_BY])
            if sys.platform == "linux":  # reaches a process that was suspended, too
                ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGCONT)
            self._start(self._watch_parent, self._parent, int(os.environ["LOCAL_RANK"]))
        else:
            os.environ[STARTED_BY] = str(os.getpid())
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):  # nohup ignores SIGHUP
                    signal.signal(signum, self.raise_at_once)
        self.watch.start()

    def raise_at_once(self, signum: int, frame: Any) -> None:
        """The handler when there is nothing to save.

        Raises:
            Stopped: Always.
        """
        self.end_with_parent()
        raise Stopped(f"Stopped by {signal_name(signum)}." if is_first_process() else "", stopped_code(signum))

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
            self._first = trainer.global_rank - trainer.local_rank
            self._start(self._watch_parent, os.getppid(), trainer.local_rank)
            return
        self._take_children()
        if self._children:
            self._start(self._watch_children, trainer.global_rank)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching: the processes end in any order."""
        self.ignore_ends()

    def end_with_parent(self) -> None:
        """Stop watching, as the processes end in any order now; but none outlives the one that started it."""
        self.ignore_ends()
        if self._parent and sys.platform == "linux":
            ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)

    def ignore_ends(self) -> None:
        """Stop watching."""
        self._stop_watching.set()
        if self._watch and self._watch is not threading.current_thread():
            self._watch.join()  # a thread that is alive when Python ends may crash it
        self._watch = None

    def largest(self, value: int) -> int:
        """The largest of the processes' values; all must call this at the same moment."""
        if self._group is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group)
        return int(tensor)

    def _take_children(self) -> None:
        """Lightning's observer, which would kill this process when a child ends, has nothing left to observe."""
        procs = getattr(self.launcher, "procs", [])
        self._children += procs
        procs.clear()

    def kill_children(self) -> None:
        """End the processes that this one started, at once."""
        self.ignore_ends()
        for child in {*self._children, *getattr(self.launcher, "procs", [])}:
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

    def _watch_parent(self, parent: int, local_rank: int) -> None:
        while not self._stop_watching.wait(POLL_SECONDS):
            if os.getppid() != parent:
                if local_rank > 1:
                    os._exit(1)  # one line is enough
                _end_with_line(f"process {self._first} is gone; the others were ended")

    def _end_at_once(self, signum: int, again: bool) -> None:
        """End all processes of this machine, whatever state they are in."""
        if is_first_process():
            why = "at once" if again else f"by {signal_name(signum)} (a process did not answer)"
            with suppress(OSError):  # nobody reads it any more
                os.write(2, f"\nStopped {why}: nothing was saved since the last checkpoint.\n".encode())
            _show_cursor()
        self.kill_children()
        if self._parent:
            time.sleep(2)  # the parent ends this process, unless it is the one that hangs
            if os.getppid() == self._parent:
                os.kill(self._parent, signal.SIGKILL)
        os._exit(stopped_code(signum))


def _is_child() -> bool:
    """Whether Lightning started this process for one of the same run; not torchrun or SLURM."""
    foreign = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ
    return STARTED_BY in os.environ and os.environ.get("LOCAL_RANK", "0") != "0" and not foreign


def end_process(exit_code: int) -> None:
    """End one of several processes without Python's own clean-up; return if there is only one.

    During that clean-up a process that had finished sometimes crashed with "terminate called without
    an active exception", as C++ says when a thread is still running: most likely a thread of the connection.
    """
    if dist.is_available() and dist.is_initialized():
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it is closed
            stream.flush()
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
    _show_cursor()
    os._exit(1)  # the main thread may hang in a collective call


def _show_cursor() -> None:
    """Undo what the progress bar has done to the terminal."""
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")
