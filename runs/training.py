"""Training the runs that are missing, each as a plain `train.py` in a process of its own; one at a time per folder."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cli.command import parse_command_line
from cli.recipes import PROJECT, resolved
from errors import SIGNALS, WITHOUT_LOCKS, Stopped, UserError, expanded, plain, signal_name, stopped_code
from runs.reading import LARGEST_SAMPLE, Run, find_runs, matches
from runs.settings import SAMPLE, shaping

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

# Exit codes of a training that was asked to stop: before it could save a checkpoint, and after.
STOPPED = (*(-signum for signum in SIGNALS), 128 + signal.SIGTERM, 128 + signal.SIGINT)
LAST_SECONDS = 10.0  # that a training has to end when it was asked twice
_HELD: list[int] = []  # file descriptors of the locks, which trainings inherit
# What a recipe's precision may become on this machine; the one asked for is first.
OF_RECIPE = {"bf16-mixed": ("bf16-mixed", "32-true"), "16-mixed": ("16-mixed", "bf16-mixed", "32-true")}
INTERRUPTED = "Stopped by Ctrl-C. The same command continues from here."


@dataclass
class Request:
    """A checked command line of compare.py.

    Attributes:
        paths: Runs to compare, or folders of runs.
        log_dir: Folder of the runs.
        output: Folder for the report, or None.
        recipes: Recipes to train first.
        seeds: How many seeds of each.
        flags: Flags of train.py.
    """

    paths: list[Path] = field(default_factory=list)
    log_dir: Path = Path("logs")
    output: Path | None = None
    recipes: list[str] = field(default_factory=list)
    seeds: int = 1
    flags: list[str] = field(default_factory=list)


def train_missing(request: Request) -> tuple[list[Run], list[str]]:
    """Train what is missing; returns the runs asked for, and a line for each that failed.

    Raises:
        UserError: If the configuration of a recipe is not valid, or another process trains in the folder.
    """
    configs = {recipe: _resolved(recipe, request.flags) for recipe in request.recipes}
    for config in configs.values():
        if config["trainer"]["fast_dev_run"] or config["trainer"]["limit_test_batches"] == 0:
            raise UserError("--train compares tested runs: leave out fast_dev_run and limit_test_batches=0")
    wanted = {recipe: shaping(config) | _sample(config["data"]) for recipe, config in configs.items()}
    may_become = {} if names_precision(request.flags) else OF_RECIPE
    for settings in wanted.values():
        asked = settings.get("trainer.precision")
        settings["trainer.precision"] = may_become.get(str(asked), asked)
    failed = []
    with training_lock(request.log_dir):
        # Seed by seed, so that all recipes can be compared early on.
        for seed in range(request.seeds):
            for recipe in request.recipes:
                code = train_one(request, recipe, seed, wanted[recipe])
                if code in STOPPED:
                    raise Stopped("The training was stopped. The same command continues from here.", 143)
                if code:
                    failed.append(f"{recipe} with seed {seed} was not finished (exit code {code}); see above")
    runs = [run for recipe in request.recipes for run in runs_of(request, recipe, wanted[recipe])]
    return [run for run in runs if run.seed in range(request.seeds)], failed


def names_precision(flags: Sequence[str]) -> bool:
    """Whether the user's flags give the precision, which train.py then follows on every machine."""
    return any(flag.startswith(("--precision", "--trainer.precision")) for flag in flags)


@contextmanager
def training_lock(log_dir: Path, name: str = ".compare.lock") -> Iterator[None]:
    """Let one process at a time train in a folder of runs; a training that is left holds the lock until it ends.

    Raises:
        UserError: If another one does, or the folder can't be made.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            lock = FileLock(log_dir / name, timeout=0).acquire()
        else:
            held = os.open(log_dir / name, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(held)
                raise Timeout(str(log_dir)) from None
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
    except Timeout:
        raise UserError(f"another process is training in {log_dir}; wait for it, or stop it") from None
    except OSError as error:
        raise UserError(f"{error.filename} can't be written: {error.strerror}; set --log_dir") from None
    if fcntl is None:
        with lock:
            yield
        return
    _HELD.append(held)
    try:
        yield
    finally:
        _HELD.remove(held)
        os.close(held)  # without unlocking it, which would unlock it for the trainings too


def train_one(request: Request, recipe: str, seed: int, wanted: dict[str, Any], seconds: float | None = None) -> int:
    """Start one run, or continue it; a finished one is not repeated.

    Args:
        request: Folder of the runs, and flags of train.py.
        recipe: Name of the recipe.
        seed: Its seed.
        wanted: The settings that identify its runs.
        seconds: Stop it after this time; it leaves a checkpoint.

    Returns:
        The exit code of train.py; one of `STOPPED` if the training was asked to stop.
    """
    mine = [run for run in runs_of(request, recipe, wanted) if run.seed == seed]
    if done := [run for run in mine if run.finished]:
        instead = isinstance(wanted.get("trainer.precision"), tuple) and done[-1].record["precision"] == "32-true"
        print(f"{recipe}, seed {seed}: finished{' in float32' * instead} ({plain(str(done[-1].folder))})", flush=True)
        return 0
    command = ["--model", recipe, "--seed", str(seed), "--log_dir", str(request.log_dir), *request.flags]
    stopped = [path for run in mine if (path := run.folder / "checkpoints" / "last.ckpt").exists()]
    if stopped:
        command += ["--ckpt_path", str(max(stopped, key=lambda path: path.stat().st_mtime))]
    print(f"{recipe}, seed {seed}: {'going on' if stopped else 'starting'}", flush=True)
    with start(command) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait()
            return STOPPED[0] if os.name == "nt" else code  # Windows ends it at once, with exit code 1


@contextmanager
def start(arguments: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen]:
    """A process of train.py, which never outlives this one, and holds the locks that this one holds.

    Signals that ask this process to stop are passed on to it; it saves a checkpoint and ends. On Linux it does so too
    if this process dies.

    Raises:
        Stopped: At the end, if there was such a signal.
    """
    own: dict[str, Any] = {} if os.name == "nt" else {"pass_fds": tuple(_HELD)}
    if sys.platform == "linux":
        own["preexec_fn"] = _stop_with(os.getpid())
    process = subprocess.Popen([sys.executable, str(PROJECT / "train.py"), *arguments], **own, **streams)
    got: list[int] = []

    def pass_on(signum: int, frame: Any) -> None:
        got.append(signum)
        if os.name != "nt" or signum != signal.SIGINT:  # Windows has sent Ctrl-C to both
            process.send_signal(signum)
        if len(got) == 2:  # asked again: a training that hangs is ended
            killing.start()

    killing = threading.Timer(LAST_SECONDS, process.kill)
    killing.daemon = True
    wanted = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]  # as SIGHUP under nohup
    before = {signum: signal.signal(signum, pass_on) for signum in wanted}
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        killing.cancel()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if got:
        message = f"Stopped by {signal_name(got[0])}. The same command continues from here."
        raise Stopped(message, stopped_code(got[0]))


def _stop_with(parent: int) -> Callable[[], None]:
    """To be called in a new process: it gets SIGTERM when its parent dies."""
    set_death_signal = ctypes.CDLL(None).prctl

    def prepare() -> None:
        set_death_signal(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before
            os._exit(143)

    return prepare


def runs_of(request: Request, recipe: str, wanted: dict[str, Any]) -> list[Run]:
    """The runs of a recipe that compute what the settings say, finished or not."""
    command = parse_command_line(["--model", recipe, *request.flags])
    assert command is not None
    folder = request.log_dir / str(command.recipe)
    asked_for = [name for name in command.decided() if name.startswith("data.") and wanted.get(name) is not None]
    found = [run for run in (find_runs([folder]) if folder.exists() else []) if matches(run, wanted, asked_for)]
    precisions = wanted.get("trainer.precision")
    if isinstance(precisions, tuple) and precisions[0] == "16-mixed":  # which only a CPU computes otherwise
        found = [run for run in found if run.record["precision"] == "16-mixed" or not run.record["machine"].get("gpu")]
    if found and isinstance(precisions, tuple):  # the first of them that there is
        taken = min((run.record["precision"] for run in found), key=precisions.index)
        return [run for run in found if run.record["precision"] == taken]
    return found


def _sample(data: dict[str, Any]) -> dict[str, bool]:
    """Whether Fashion-MNIST will be tests/data's sample, told by the test labels' size; nothing for other pictures."""
    if data.get("folder") or data.get("dataset"):
        return {}
    labels = Path(expanded(data["data_dir"]), "t10k-labels-idx1-ubyte")  # elsewhere the set is whole
    found = next((file for file in (labels, labels.with_name(f"{labels.name}.gz")) if file.is_file()), None)
    return {SAMPLE: found is not None and found.stat().st_size <= LARGEST_SAMPLE}  # a label takes a byte, or less


def _resolved(recipe: str, flags: list[str]) -> dict[str, Any]:
    """The configuration of one of several recipes; errors name the recipe."""
    try:
        return resolved(recipe, flags)
    except UserError as error:
        raise UserError(f"{recipe}: {error}") from None
