"""What several test files share: processes that run train.py, and one trained run."""

import errno
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

# The tests' processes are no part of a job that the shell belongs to, and their output does not go to its terminal.
if held := [
    name
    for name in os.environ
    if name.startswith(("SLURM_", "TORCHELASTIC_", "PL_", "MASTER_", "TTY_"))
    or name.endswith(("RANK", "WORLD_SIZE"))
    or name in ("FORCE_COLOR", "COLUMNS", "LINES")
]:
    for name in held:
        del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; idle OpenMP threads spin
os.environ["no_proxy"] = "127.0.0.1,localhost"  # the tests' own servers
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As under nohup in the background. The processes of the tests would inherit it, and some are sent a Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as above

import pytest
from commands import DATA, Answer, run, start_server
from filelock import FileLock
from hypothesis import HealthCheck, settings

# The default run says the same twice. `make fuzz` searches on; what it finds becomes an @example of the default run.
# Deadlines are off: other programs share the machine. A hang is caught by the time limit of the test run.
SEARCHES = bool(os.environ.get("FUZZ"))
settings.register_profile(
    "project", derandomize=not SEARCHES, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("project")


def examples(count: int) -> settings:
    """Settings of a property test with this many examples; with 2,000 at least under `make fuzz`."""
    return settings(max_examples=max(count, 2000) if SEARCHES else count)


class Run(NamedTuple):
    """A finished `python train.py --model lenet`: where it was started, its folder, and what it printed."""

    start: Path
    folder: Path
    answer: Answer

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session", autouse=True)
def _server() -> None:
    start_server()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three epochs of LeNet on the sample; 297 validation images, so that no batch size divides them."""
    flags = "--model lenet --val_size 297 --max_epochs 3 --batch_size 32 --accelerator cpu --devices 1 --precision 32"
    return train_once("trained", tmp_path_factory, *flags.split(), f"--data_dir={DATA}")


@pytest.fixture
def like_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are renamed, replaced and removed as on Windows: not while this process has them open or mapped."""

    def watched(change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*paths: Any, **settings: Any) -> Any:
            fds = []
            for fd in Path("/proc/self/fd").iterdir():
                with suppress(OSError):  # another thread has just closed it
                    fds.append(str(fd.readlink()))
            mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
            for path in map(os.path.realpath, paths):
                if path in fds or f" {path}\n" in mapped:
                    raise PermissionError(errno.EACCES, "is open", path)
            return change(*paths, **settings)

        return wrapped

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    monkeypatch.setattr("checkpoints.writing.fcntl", None)


def train_once(name: str, tmp_path_factory: pytest.TempPathFactory, *arguments: str) -> Run:
    """A finished run of train.py that pytest-xdist's processes share: the first one that needs it trains."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each process has a folder of its own in this one
    start, done = folder / name, folder / f"{name}.json"
    with FileLock(folder / f"{name}.lock"):
        if not done.exists():
            start.mkdir()
            answer = run(*arguments, folder=start, timeout=600)
            assert answer.code == 0, answer.err
            done.write_text(json.dumps(answer))
    return Run(start, start / "logs" / "lenet" / "version_0", Answer(*json.loads(done.read_text())))
