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
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import launch.run  # noqa: F401  # before forking, so that the children need not import it
from checkpoints.reading import read_checkpoint
from checkpoints.writing import AtomicCheckpointIO
from errors import UserError

PROJECT = Path(__file__).parents[1]
DATA = PROJECT / "tests" / "data"
LENET = ["--model", "lenet", "--data_dir", str(DATA), "--val_size", "300", "--accelerator", "cpu", "--devices", "1"]


def kills_while_writing(count: int, folder: Path) -> dict[str, Any]:
    """Kill a writer of 8 MB checkpoints at random moments."""
    path = folder / "last.ckpt"
    valid = 0
    interrupted = 0
    for _ in range(count):
        step = read_checkpoint(path)["step"] if path.exists() else -1
        pid = os.fork()
        if pid == 0:
            while True:
                step += 1
                weights = torch.full((2_000_000,), float(step))
                AtomicCheckpointIO().save_checkpoint({"state_dict": {"weights": weights}, "step": step}, path)
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
    assert _train(arguments, whole) == 0
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
    assert _train([*arguments, *more], parts) == 0
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
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            match = re.search(r"VmRSS:\s+(\d+) kB", status)
            assert match
            rss.append(int(match[1]) * 1024)
            files.append(len(os.listdir(f"/proc/{process.pid}/fd")))  # noqa: PTH208
            log_bytes.append(
                sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".ckpt")
            )
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


def _train(arguments: list[str], folder: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(_start(arguments, folder), 0)[1])


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    # A run that is killed before its first checkpoint leaves a folder without one.
    paths = folder.glob("logs/lenet/version_*/checkpoints/last.ckpt")
    return read_checkpoint(max(paths, key=lambda path: path.stat().st_mtime))["state_dict"]


def main() -> None:
    """Run all, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write_kills", type=int, default=200)
    parser.add_argument("--interruptions", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "reliability.json")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    record: dict[str, Any] = {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("writing", "killed", "stopped", "long")]
        for folder in folders:
            folder.mkdir()
        record["kills_while_writing"] = writing = kills_while_writing(options.write_kills, folders[0])
        record["kills_of_training"] = killed = interruptions(signal.SIGKILL, options.interruptions, folders[1])
        record["stops_of_training"] = stopped = interruptions(signal.SIGTERM, options.interruptions, folders[2])
        record["long_run"] = long = long_run(options.epochs, folders[3])
    print(f"kills while writing      {writing['kills']}, {writing['in_the_middle_of_a_file']} in the middle of a file")
    print(f"  valid afterwards       {writing['valid_afterwards']}")
    for name, result in (("kill -9", killed), ("SIGTERM", stopped)):
        print(f"training, {name:<14} {result['interruptions']} times, exit codes {result['exit_codes']}")
        print(f"  slowest end            {result['slowest_end_seconds']:.1f} s")
        print(f"  weights bit-equal      {result['bit_equal']}")
    print(f"long run                 {long['epochs']} epochs")
    print(f"  memory after 10, end   {long['rss_bytes_after_10'] / 1e6:,.0f} MB, {long['rss_growth_after_10']:+.2%}")
    print(f"  open files             {long['open_files'][0]}, {long['open_files'][1]}")
    early, late = long["log_bytes_an_epoch"]
    print(f"  logs an epoch          {early:,.0f} B in the first half, {late:,.0f} B in the second")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
