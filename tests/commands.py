"""Runs train.py as a user does: as a process of its own, with its own standard output, errors and working folder."""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.files.finding import SYSTEM_DIR, DatasetError, load

REPO = Path(__file__).parents[1]
DATA = REPO / "tests" / "data"
# Windows forks nothing.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
# Two cores at most are free on a small machine, and idle OpenMP threads spin.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Answer(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def run(*arguments: str, folder: Path, timeout: float = 600) -> Answer:
    """`python train.py ARGUMENTS` in a folder."""
    command = [sys.executable, str(REPO / "train.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    return Answer(done.returncode, done.stdout, done.stderr)


def run_forked(
    *arguments: str, folder: Path, timeout: float = 600, prepare: Callable[[], None] | None = None
) -> Answer:
    """The same, in a process that is forked, where possible, from one that has imported torch: seconds less.

    `prepare` is called there first.
    """
    context: Any = multiprocessing.get_context(METHOD)
    with tempfile.TemporaryDirectory() as streams:
        process = context.Process(target=_child, args=(arguments, folder, streams, prepare))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"train.py {' '.join(arguments)} ran for more than {timeout} s")
        out, err = (Path(streams, name).read_text(encoding="utf-8") for name in ("out", "err"))
    return Answer(process.exitcode or 0, out, err)


@contextmanager
def read_only_folder() -> Iterator[Path]:
    """An empty folder in which this process can't write meanwhile."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's own, which nobody else may enter
        Path(folder).chmod(0o555)
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


def free_port() -> int:
    """One below those that the system gives away, so that nobody else gets it meanwhile."""
    for port in range(20_000 + os.getpid() % 1000 * 10, 32_000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


def start_server() -> None:
    """Start the process that the others are forked from."""
    if METHOD != "forkserver":
        return
    context = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload(["launch.run"])
    kept = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    try:
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _child(arguments: tuple[str, ...], folder: Path, streams: str, prepare: Callable[[], None] | None) -> None:
    if METHOD == "forkserver":
        multiprocessing.set_start_method("fork", force=True)  # else a loader's workers import everything anew
    os.chdir(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(streams, name), os.O_WRONLY | os.O_CREAT), descriptor)
    if prepare:
        prepare()
    sys.argv = [str(REPO / "train.py"), *arguments]
    import train

    sys.exit(train.main(list(arguments)))


def whole_set() -> Path | None:
    """The folder of the full data set on this machine; None where there is none."""
    for folder in (REPO / "data", REPO / "data" / "FashionMNIST" / "raw", SYSTEM_DIR):
        try:
            if len(load(folder, "train")[1]) == 60_000 and len(load(folder, "test")[1]) == 10_000:
                return folder
        except DatasetError:
            continue
    return None
