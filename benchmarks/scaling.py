"""Images/s on 1, 2, 4, ... devices, and what to expect beyond them.

Measured: train.py with `--devices N` on this machine, each process with the recipe's batch (weak scaling), in turn. CPU
processes share the cores, so their efficiency is relative to one process with all of them.

Calculated: the gradient bytes of each network, and how long a ring all-reduce of them takes at stated link speeds,
beside the step that throughput.py has measured. Lightning overlaps the two; this is the worst case, without overlap.

Command: python -m benchmarks.scaling --data_dir DIR
"""

import os
import sys
import time
from statistics import median
from typing import Any

import torch

from benchmarks.harness import side_by_side
from benchmarks.harness.side_by_side import print_table, trained
from benchmarks.peers.plain_loops import build
from errors import run_program

# Bytes a second that each GPU sends and receives at once: NVLink 4 of H100 and H200 (900 GB/s both ways), as NVIDIA's
# data sheets state, and one 400 Gbit/s network port a GPU between nodes.
LINKS = {"8 GPUs, NVLink 450 GB/s": (8, 450e9), "64 GPUs, 400 Gbit/s network": (64, 50e9)}
NETWORKS = ("lenet", "alexnet", "vgg11", "vgg19", "nin", "googlenet")


def all_reduce_seconds(size: int, devices: int, bytes_a_second: float) -> float:
    """Seconds of a ring: each device sends and receives 2 (N - 1) / N times the gradient."""
    return 2 * (devices - 1) / devices * size / bytes_a_second


def images_per_second(model: str, devices: int, options: Any) -> dict[str, Any]:
    """One short run of train.py; the speed is the second epoch's."""
    arguments = ["fit", "--model", model, "--devices", str(devices), "--max_epochs", "2", "--val_size", "0"]
    arguments += [f"--trainer.limit_train_batches={options.steps}", *options.shared]
    record = trained(arguments, options.seconds + 300)
    return {
        "images_per_second": record["epochs"][1]["images_per_second"],
        "seconds": record["epochs"][1]["seconds"],
        "batch_size": record["batch_size"],
    }


def _step_milliseconds(options: Any) -> dict[str, float]:
    """Each network's measured step on one device, from throughput.py's record."""
    results = side_by_side.recorded("throughput", options) or []
    return {one["network"]: 1e3 * one["batch_size"] / one["contestants"][0]["images_per_second"] for one in results}


def main() -> None:
    """Measure, then calculate."""
    parser = side_by_side.Parser(__doc__, budget=75, flags=True)
    parser.add_argument("--model", default="lenet", help="recipe that is measured (default: lenet)")
    parser.add_argument("--devices", type=int, nargs="+", help="numbers of devices (default: 1, 2, 4, ...)")
    parser.add_argument("--steps", type=int, default=200, help="steps per epoch (default: %(default)s)")
    options = parser.parse_args()
    most = torch.cuda.device_count() if options.accelerator == "gpu" else min(2, os.cpu_count() or 1)
    counts = options.devices or [2**power for power in range(most.bit_length()) if 2**power <= most]
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    begun, longest = time.monotonic(), 0.0
    while not all(runs.values()) or time.monotonic() - begun + longest < options.seconds:
        start = time.monotonic()
        for count in counts:
            runs[count].append(images_per_second(options.model, count, options))
        longest = max(longest, time.monotonic() - start)
    speeds = {count: median(run["images_per_second"] for run in runs[count]) for count in counts}
    base = speeds[counts[0]] / (counts[0] if options.accelerator == "gpu" else 1)
    ideal = {count: base * (count if options.accelerator == "gpu" else 1) for count in counts}
    rows = [
        (count, runs[count][0]["batch_size"], f"{speeds[count]:,.0f}", f"{speeds[count] / ideal[count]:.2f}")
        for count in counts
    ]
    print(f"{options.model}, {options.steps} steps an epoch")
    print_table("devices | global batch | images/s | efficiency", rows)

    sizes = {model: 4 * sum(parameter.numel() for parameter in build(model)[0].parameters()) for model in NETWORKS}
    steps, table = _step_milliseconds(options), []
    for model, size in sizes.items():
        milliseconds = (1e3 * all_reduce_seconds(sent, *link) for sent in (size, size // 2) for link in LINKS.values())
        step = f"{steps[model]:,.1f}" if model in steps else "not measured"
        table.append((model, f"{size / 1e6:,.1f}", *(f"{value:,.2f}" for value in milliseconds), step))
    print("\nAll-reduce of the gradient, calculated, in ms a step, beside the measured step of one device")
    names = " | ".join([*LINKS, *(f"bf16, {name}" for name in LINKS)])
    print_table(f"network | gradient, MB | {names} | step, ms", table)
    results = {
        "model": options.model,
        "runs": {str(count): values for count, values in runs.items()},
        "efficiency": {str(count): speeds[count] / ideal[count] for count in counts},
        "gradient_bytes": sizes,
        "all_reduce_seconds": {
            model: {name: all_reduce_seconds(size, *link) for name, link in LINKS.items()}
            for model, size in sizes.items()
        },
    }
    side_by_side.write_record("scaling", options, results)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.scaling", main))
