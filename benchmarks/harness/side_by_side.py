"""Contestants side by side: each in a process of its own, taking turns (A B A B ...) until the time is used up.

A contestant is a command that calls `Turns.step` after each step of its work. Its own process gives it its own
settings, caches and peak memory, and it sleeps while another one is measured.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from errors import OneLineParser, UserError, printed_error
from runs.flags import at_least_one
from runs.record import commit, machine, peak_memory, write_json

PROJECT = Path(__file__).resolve().parents[2]
RESULTS = PROJECT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "timm", "d2l", "pillow")
SETTLE = 0.3  # seconds between turns, in which a contestant's loader workers fill their queue and fall asleep
START_LIMIT = 600.0  # seconds that a contestant may take to start, or for one turn


class Missing(Exception):
    """A contestant can't take part; the message says why."""


class Ended(RuntimeError):
    """A contestant's process ended early."""


class Turns:
    """The contestant's side: says when to work, and measures the work.

    Args:
        device: "cpu" or "cuda"; a turn waits for the latter at its beginning and its end.
        warm_up: Seconds of unmeasured steps at the beginning of a turn, two steps at least: the first ones after a
            pause are slow, with memory given back and caches cold. A turn of a single step has them only once.
    """

    def __init__(self, device: str = "cpu", warm_up: float = 0.3) -> None:
        # Not standard output, which the contestant may use as it likes.
        self._out = os.fdopen(int(os.environ["CONTEST_REPORTS"]), "w", buffering=1)
        self._device = device
        self._warm_up = warm_up
        self._step_seconds = 0.0
        self._begin(0.0, 1)

    def _begin(self, seconds: float, least_steps: int) -> None:
        self._seconds, self._least_steps, self._amount, self._steps = seconds, least_steps, 0.0, 0
        self._measuring = least_steps == 1 and self._step_seconds > self._warm_up
        self._unmeasured = 0 if least_steps == 1 else 2
        self._start_clocks()
        self._last = self._begun

    def _start_clocks(self) -> None:
        self._begun, self._cpu_begun = time.perf_counter(), time.process_time()

    def wait(self) -> None:
        """Say that everything is ready, and wait for the first turn."""
        self._report({"ready": True})

    def step(self, amount: float) -> None:
        """Note that one step is done; returns when the next one is due, which may be after the others' turns.

        Args:
            amount: What the step has done: images, or floating-point operations.
        """
        now = time.perf_counter()
        if not self._measuring:
            self._step_seconds, self._last = now - self._last, now
            self._unmeasured -= 1
            if now - self._begun >= self._warm_up and self._unmeasured <= 0:
                synchronize(self._device)
                self._start_clocks()
                self._measuring = True
            return
        self._steps += 1
        self._amount += amount
        if now - self._begun >= self._seconds and self._steps >= self._least_steps:
            synchronize(self._device)
            elapsed = time.perf_counter() - self._begun
            self._step_seconds = elapsed / self._steps
            values = {"rate": self._amount / elapsed, "steps": self._steps, "seconds": elapsed}
            values["cpu_seconds"] = time.process_time() - self._cpu_begun
            self._report(values | {"peak_memory_bytes": peak_memory(self._device)})

    def missing(self, why: str) -> None:
        """Say that this contestant can't take part, and end."""
        print(json.dumps({"missing": why}), file=self._out)
        sys.exit(0)

    def _report(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self._out)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the contest is over; nothing here is worth saving
        seconds, least_steps = line.split()
        self._begin(float(seconds), int(least_steps))


class Contestant:
    """The contest's side of one contestant.

    Args:
        command: Arguments for Python.
        terminal: Let the contestant's standard output be a terminal, as if somebody were watching.
    """

    def __init__(self, command: Sequence[str], terminal: bool = False) -> None:
        reports, writer = os.pipe()
        environment = os.environ | {"PYTHONPATH": python_path(), "CONTEST_REPORTS": str(writer)}
        self._errors = Path(os.environ.get("CONTEST_LOG", os.devnull)).open("ab")  # noqa: SIM115
        output: Any = self._errors
        if terminal:
            import pty  # here, not above: Windows has none

            watcher, output = pty.openpty()
            environment |= {"TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
            threading.Thread(target=_drain, args=(watcher,), daemon=True).start()
        streams = {"stdin": subprocess.PIPE, "stdout": output, "stderr": self._errors, "pass_fds": (writer,)}
        self.process = subprocess.Popen([sys.executable, *command], text=True, env=environment, cwd=PROJECT, **streams)
        os.close(writer)
        if terminal:
            os.close(output)
        self._reports = os.fdopen(reports)

    def ready(self) -> None:
        """Wait until it can take its first turn."""
        try:
            self._read()
        except BaseException:
            self.stop()
            raise

    def turn(self, seconds: float, least_steps: int = 1) -> dict[str, Any]:
        """Let it work for about this many seconds, and this many measured steps; returns what it reports."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds} {least_steps}\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reports.close()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        watchdog = threading.Timer(START_LIMIT, self.process.kill)
        watchdog.start()
        try:
            line = self._reports.readline()
        finally:
            watchdog.cancel()
        if not line:
            command = " ".join(map(str, self.process.args[1:]))  # type: ignore[index]
            raise Ended(f"a contestant ended early; set CONTEST_LOG=FILE to see why: {command}")
        values = json.loads(line)
        if "missing" in values:
            raise Missing(values["missing"])
        return values


def contest(
    contestants: Mapping[str, Callable[[], Contestant]],
    budget: float,
    turn: float,
    least_rounds: int = 2,
    least_steps: int = 1,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Let all contestants take turns.

    Args:
        contestants: Name to command; they take turns in this order.
        budget: Seconds for the whole contest, start included.
        turn: Seconds for each turn, at least.
        least_rounds: Number of rounds that are run even if the budget is used up.
        least_steps: Number of measured steps in a turn, at least.

    Returns:
        The reports of each contestant's turns, and why others could not take part.
    """
    if os.name == "nt":
        sys.exit("Contestants are started in a way that needs Linux or macOS")  # with open pipes: pass_fds
    start = time.monotonic()
    running: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    turns: dict[str, list[dict[str, Any]]] = {}
    try:
        for name, begin in contestants.items():
            try:
                running[name] = begin()
            except Missing as reason:
                missing[name] = str(reason)
        for name, contestant in [*running.items()]:  # started together, because importing takes them longest
            try:
                contestant.ready()
                turns[name] = []
            except (Missing, Ended) as reason:
                del running[name]
                if not turns:
                    raise  # the first is the one that the others are compared with
                missing[name] = str(reason)
        round_seconds = 0.0
        while running:
            begun = time.monotonic()
            if len(next(iter(turns.values()))) >= least_rounds and begun + round_seconds > start + budget:
                break
            for name, contestant in [*running.items()]:
                time.sleep(SETTLE)
                try:
                    turns[name].append(contestant.turn(turn, least_steps))
                except Ended as reason:  # often out of memory; the others go on
                    if name == next(iter(contestants)):
                        raise
                    running.pop(name).stop()
                    turns.pop(name)
                    missing[name] = str(reason)
            round_seconds = time.monotonic() - begun
    finally:
        for contestant in running.values():
            contestant.stop()
    return turns, missing


def synchronize(device: str) -> None:
    """Wait for a GPU to finish what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def trained(arguments: Sequence[str], timeout: float | None = None) -> dict[str, Any]:
    """Run train.py to its end in a folder that is removed; returns the record that it leaves.

    Raises:
        RuntimeError: If it fails, with the end of its output.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as logs:
        checked([str(PROJECT / "train.py"), *arguments, "--log_dir", logs], timeout)
        (record,) = Path(logs).rglob("record.json")
        return json.loads(record.read_text(encoding="utf-8"))


def train_in_background() -> None:
    """Let what this process starts run beside other work: at the lowest priority, on one thread."""
    if hasattr(os, "nice"):
        os.nice(19)
    # Threads that wait by spinning would slow down the other work many times over.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def checked(arguments: Sequence[str], timeout: float | None = None) -> str:
    """Run Python with these arguments; returns what it printed.

    Raises:
        UserError: If it refuses its arguments.
        RuntimeError: If it fails, with the end of its output.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=PROJECT, timeout=timeout)
    if done.returncode == UserError.exit_code:
        raise UserError(printed_error(done.stderr))
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def median(turns: Sequence[dict[str, Any]], key: str = "rate") -> float:
    """The median of one value over the turns."""
    return statistics.median(turn[key] for turn in turns)


def ratios(turns: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], key: str = "rate") -> dict[str, float]:
    """Median, least and greatest of the ratio of two contestants' values within one round."""
    values = [mine[key] / theirs[key] for mine, theirs in zip(turns, others, strict=True)]
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


class Parser(OneLineParser):
    """The flags that all benchmarks share.

    The result also holds the device (cpu, cuda), the place, as it was at the start, and flags for train.py: `shared` by
    all runs, `single` for those on one device.

    Args:
        description: For `--help`.
        budget: Seconds that the benchmark takes.
        flags: Whether it passes further flags to train.py.
    """

    def __init__(self, description: str | None, budget: float, flags: bool = False) -> None:
        super().__init__(description=description)
        self.register("type", int, at_least_one)  # a number of seeds, steps or images
        self.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
        self.add_argument("--seconds", type=float, default=budget, help="time budget (default: %(default)g)")
        self.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of Fashion-MNIST (default: data)")
        self.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
        self.set_defaults(flags="")
        if flags:
            self.add_argument("--flags", help="more flags for train.py, in quotes")

    def parse_args(self, *given: Any) -> Any:  # type: ignore[override]
        """The options."""
        options = super().parse_args(*given)
        options.data_dir = str(options.data_dir.resolve())
        options.device = {"cpu": "cpu", "gpu": "cuda"}[options.accelerator]
        import torch

        if options.accelerator == "gpu" and not torch.cuda.is_available():
            raise UserError("PyTorch finds no NVIDIA GPU here")
        options.place = machine(options.device)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        options.place |= {"threads": torch.get_num_threads(), "load_before": load}
        options.shared = ["--accelerator", options.accelerator, "--data_dir", options.data_dir, *options.flags.split()]
        options.single = [*options.shared, "--devices", "1"]
        return options


def versions() -> dict[str, str]:
    """Versions of Python and of those relevant packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_record(name: str, options: argparse.Namespace, results: Any) -> Path:
    """Write one benchmark's record, NAME-ACCELERATOR.json, and say where."""
    record = {"benchmark": name, **occasion(name, options.place), "versions": versions(), "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    path = record_path(name, options)
    write_json(path, record)
    facts = {name: fact for name, fact in (options.place | record["versions"]).items() if fact is not None}
    print(f"\n{', '.join(f'{name} {fact}' for name, fact in facts.items())}\nRecord: {path}")
    return path


def record_path(name: str, options: argparse.Namespace) -> Path:
    """The path of a benchmark's record."""
    return options.out / f"{name}-{options.accelerator}.json"


def recorded(name: str, options: argparse.Namespace) -> Any:
    """The results in a benchmark's record; None if it has not run yet."""
    path = record_path(name, options)
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else None


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two places are of one kind, whatever runs on it."""
    return all(one.get(part) == other.get(part) for part in ("cpu", "cores", "gpu"))


def occasion(name: str, place: dict[str, Any]) -> dict[str, Any]:
    """How, when, with which code and on what a benchmark runs; the machine's folders are left out of the command."""
    folders = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--data_dir", "--folder", "--out"):
        folders.add_argument(flag)
    _, arguments = folders.parse_known_args()
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": place,
    }


def spread(ratio: dict[str, float], digits: int = 2) -> str:
    """'median (least to greatest)' of ratios."""
    middle, least, greatest = (f"{ratio[key]:.{digits}f}" for key in ("median", "least", "greatest"))
    return f"{middle} ({least} to {greatest})"


def print_table(header: str, rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table; its header is given as `first | second | third`."""
    lines = [header.split(" | "), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def python_path() -> str:
    """The value of PYTHONPATH with which a process finds this project, and the peers, wherever they are installed."""
    return os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))


def _drain(descriptor: int) -> None:
    with suppress(OSError):  # the contestant has closed its end
        while os.read(descriptor, 1 << 16):
            pass
    os.close(descriptor)
