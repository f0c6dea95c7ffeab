"""Signals that ask a run to stop end it even if its main thread hangs."""

import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable

from errors import SIGNALS

# A second Ctrl-C within this time is the first: `timeout` and terminals may send it to the group and to the process.
SAME_CTRL_C_SECONDS = 0.5
# Seconds that a process may take to end when there is nothing to save.
BEFORE_TRAINING = 3.0


class SignalWatch:
    """Waits for the main thread to answer the signals of `SIGNALS`; calls `end` if it does not or is asked again.

    Python runs a signal's handler in the main thread, between two of its instructions, and so never during a collective
    call that waits for a process that hangs. But the signal's number is also written into a pipe at once, whatever the
    main thread is doing, and a thread reads it there. (POSIX systems only.)

    Args:
        end: Called with the signal, and whether it is a second Ctrl-C; ends the process.
        asked: Called at the first signal.

    Attributes:
        patience: Seconds that the main thread may take to answer; infinite while it saves.
    """

    def __init__(self, end: Callable[[int, bool], None], asked: Callable[[], None]) -> None:
        self.patience = BEFORE_TRAINING
        self._end, self._asked = end, asked
        self._thread: threading.Thread | None = None
        self._progress = self._longest = 0.0

    def start(self) -> None:
        """Start to watch; only the main thread can."""
        if os.name != "posix" or threading.current_thread() is not threading.main_thread():
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget)  # ending a loader's worker is no reason to stop
        self._thread = threading.Thread(target=self._watch, daemon=True, name="signal-watch")
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        if self._thread:
            signal.set_wakeup_fd(-1)
            os.write(self._pipe[1], b"\0")
            self._thread.join()
            self._thread = None
            for descriptor in self._pipe:
                os.close(descriptor)

    def progress(self) -> None:
        """Called after each batch: the duration of a batch says how long to wait for one."""
        now = time.monotonic()
        if self._progress:
            self._longest = max(self._longest, now - self._progress)
            self.patience = 10 + 3 * self._longest
        self._progress = now

    def _watch(self) -> None:
        asked: list[tuple[float, int]] = []
        while True:
            ready, _, _ = select.select([self._pipe[0]], [], [], 0.5 if asked else None)
            now = time.monotonic()
            for number in os.read(self._pipe[0], 64) if ready else b"":
                if number == 0:
                    return
                if number not in SIGNALS:
                    continue
                if not asked:
                    self._asked()
                if number == getattr(signal, "SIGHUP", None):
                    leave_terminal()
                if asked and number == asked[-1][1] and now - asked[-1][0] <= SAME_CTRL_C_SECONDS:
                    continue  # one request, to the process and to its group, as `timeout` sends it
                if asked and number == signal.SIGINT and now - asked[0][0] > SAME_CTRL_C_SECONDS:
                    self._end(number, True)
                asked.append((now, number))
            # After a second request it waits no longer than this.
            late = asked and (
                now - asked[0][0] > self.patience
                or (len(asked) > 1 and now - asked[-1][0] > min(self.patience, BEFORE_TRAINING))
            )
            if late and self.patience < float("inf"):
                self._end(asked[-1][1], False)


def leave_terminal() -> None:
    """Write no more to a terminal that was closed, which would be an error."""
    for descriptor in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)
        except OSError:
            continue


def _forget() -> None:
    signal.set_wakeup_fd(-1)
