"""Counts for the README: kills while a checkpoint is written, kills and stops of training, and a long run.

1. A process keeps saving checkpoints and is killed at random moments; after each kill the file must load and be one
   of those that were saved.
2. Training is killed (SIGKILL), or asked to stop (SIGTERM), at random moments many times, and continued each time
   with `--ckpt_path last`; in the end its weights must equal those of the uninterrupted run, bit for bit.
3. LeNet trains for many epochs; memory, open files and the size of the logs are read after each.

Everything runs on the sample in tests/data, on the CPU. Linux only (it reads /proc).

Command: python -m benchmarks.reliability
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import launch.run  # noqa: F401  # before forking, so that the children need not import it
from checkpoints.reading import read_checkpoint
from checkpoints.writing import AtomicCheckpointIO
from errors import OneLineParser, UserError, run_program
from runs.record import write_json

PROJECT = Path(__file__).parents[1]
DATA = PROJECT / "tests" / "data"
LENET = ["--model", "lenet", "--data_dir", str(DATA), "--val_size", "300", "--accelerator", "cpu", "--devices", "1"]


def kills_while_writing(count: int, folder: Path) -> dict[str, Any]:
    """Kill a writer of 8 MB checkpoints at random moments."""
    path = folder / "last.ckpt"
    valid = 0
    interrupted = 0

    def save(step: int) -> None:
        weights = torch.full((2_000_000,), float(step))
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"weights": weights}, "step": step}, path)

    save(0)
    for _ in range(count):
        step = read_checkpoint(path)["step"]
        pid = os.fork()
        if pid == 0:
            while True:
                step += 1
                save(step)
        time.sleep(random.uniform(0.02, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        interrupted += bool(list(folder.glob("*.partial")))
        try:
            content = read_checkpoint(path)
            valid += bool((content["state_dict"]["weights"] == content["step"]).all() and content["step"] >= step)
        except UserError as error:
            print(error)
    return {"kills": count, "in_the_middle_of_a_file": interrupted, "valid_afterwards": valid}


def interruptions(signum: signal.Signals, count: int, folder: Path) -> dict[str, Any]:
    """Interrupt training at random moments, continue, and compare with the run that was left alone."""
    arguments = ["fit", *LENET, "--max_epochs", "30", "--batch_size", "20"]
    whole, parts = folder / "whole", folder / "parts"
    began = time.perf_counter()
    _train(arguments, whole)
    seconds = time.perf_counter() - began
    done, codes, latencies = 0, set(), []
    more: list[str] = []
    while done < count:
        pid = _start([*arguments, *more], parts)
        time.sleep(random.uniform(0.3, 0.3 + 2 * seconds / count))
        asked = time.perf_counter()
        os.kill(pid, signum)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            break  # training ended first
        if (parts / "logs").exists() and list(parts.glob("logs/lenet/version_*/checkpoints/last.ckpt")):
            more = ["--ckpt_path", "last"]
            done += 1
            codes.add(code)
            latencies.append(time.perf_counter() - asked)
    _train([*arguments, *more], parts)
    first, second = (_weights(run) for run in (whole, parts))
    return {
        "interruptions": done,
        "exit_codes": sorted(codes),
        "slowest_end_seconds": max(latencies),
        "bit_equal": first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first),
    }


def long_run(epochs: int, folder: Path) -> dict[str, Any]:
    """Train LeNet and read memory, open files and log size after each epoch."""
    command = [sys.executable, str(PROJECT / "train.py"), "fit", *LENET, "--max_epochs", str(epochs)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout
    rss, files, log_bytes = [], [], []
    for line in process.stdout:
        if line.startswith("epoch "):
            pages = Path(f"/proc/{process.pid}/statm").read_text(encoding="utf-8").split()[1]
            rss.append(int(pages) * os.sysconf("SC_PAGE_SIZE"))
            files.append(len(os.listdir(f"/proc/{process.pid}/fd")))  # noqa: PTH208
            logs = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".ckpt"]
            log_bytes.append(sum(path.stat().st_size for path in logs))
    assert process.wait() == 0
    half = len(log_bytes) // 2
    return {
        "epochs": len(rss),
        "rss_bytes_after_10": rss[9],
        "rss_bytes_at_end": rss[-1],
        "rss_growth_after_10": rss[-1] / rss[9] - 1,
        "open_files": [files[9], files[-1]],
        "log_bytes_at_end": log_bytes[-1],
        "log_bytes_an_epoch": [
            (log_bytes[half] - log_bytes[9]) / (half - 9),
            (log_bytes[-1] - log_bytes[half]) / (len(rss) - 1 - half),
        ],
        "rss_bytes": rss,
    }


def _start(arguments: list[str], folder: Path) -> int:
    """Fork a process that runs train.py in a folder; its output goes into a file there."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["train.py", *arguments]
    code = 70
    try:
        import train

        code = train.main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _train(arguments: list[str], folder: Path) -> None:
    if code := os.waitstatus_to_exitcode(os.waitpid(_start(arguments, folder), 0)[1]):
        output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"train.py {' '.join(arguments)} ended with {code}: {output[-2000:]}")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    # A run that is killed before its first checkpoint leaves a folder without one.
    paths = folder.glob("logs/lenet/version_*/checkpoints/last.ckpt")
    return read_checkpoint(max(paths, key=lambda path: path.stat().st_mtime))["state_dict"]


def main() -> None:
    """Run all, print the numbers and write the record."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write_kills", type=int, default=200)
    parser.add_argument("--interruptions", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "reliability.json")
    options = parser.parse_args()
    if options.epochs < 20:
        parser.error("--epochs must be at least 20: the first ten are left out")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)  # threads of this process do not exist in those forked from it, which would wait for them
    record: dict[str, Any] = {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }
    record |= {"python": platform.python_version(), "torch": torch.__version__}
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kills_while_writing": partial(kills_while_writing, options.write_kills),
        "kills_of_training": partial(interruptions, signal.SIGKILL, options.interruptions),
        "stops_of_training": partial(interruptions, signal.SIGTERM, options.interruptions),
        "long_run": partial(long_run, options.epochs),
    }
    for name, measure in parts.items():
        with tempfile.TemporaryDirectory() as folder:
            record[name] = measure(Path(folder))
    shown = {**record, "long_run": {name: value for name, value in record["long_run"].items() if name != "rss_bytes"}}
    print(json.dumps(shown, indent=1))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, record)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.reliability", main))
