"""Where a training step goes, by kind of operation, and how near its convolutions and linear layers come to the peak.

Each network at its tutorial size, as train.py computes it, on random images under torch.profiler: in bfloat16 on a GPU,
in float32 elsewhere. The peak is that of one large matrix product, as in throughput.py.

Command: python -m benchmarks.step_profile
"""

import multiprocessing
import sys
import time
import timeit
from collections import defaultdict
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import side_by_side
from benchmarks.harness.side_by_side import print_table, synchronize
from benchmarks.peers.plain_loops import matrix_product, ours
from benchmarks.throughput import NETWORKS, training_flops_by_operation
from cli.recipes import read_recipe
from errors import run_program
from launch.memory import keep_freed_memory

WARM_UP = 6  # steps, until VGG has collected the memory that is kept
PROFILED = 5  # steps, in one run: reading the events in between would break up the memory that is kept
# Kind of operation, and what the names of PyTorch's operations of that kind contain.
KINDS = {
    "convolution": ("convolution",),
    "linear": ("aten::mm", "aten::addmm"),
    "pooling": ("pool",),
    "normalisation": ("batch_norm",),
    "activation": ("threshold", "clamp_min", "relu"),
    "optimiser": ("adam", "optimizer"),
}


def main() -> None:
    """Profile a step of each network."""
    parser = side_by_side.Parser(__doc__, budget=150)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="recipes (default: all five)")
    parser.add_argument("--batch_size", type=int, help="instead of each recipe's own")
    options = parser.parse_args()
    begun = time.monotonic()
    device = options.device
    peak = _peak(device)
    results: list[dict[str, Any]] = []
    rows = []
    for model in options.networks:
        if results and time.monotonic() - begun > options.seconds:
            print(f"No time left for {model}: give it --seconds")
            continue
        recipe = read_recipe(model)["data"]
        batch_size, image_size = options.batch_size or recipe["batch_size"], recipe["image_size"]
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # whose memory no other network has used
            seconds = pool.apply(profiled, (model, batch_size, image_size, device))
        flops: dict[str, float] = defaultdict(float)
        for operation, count in training_flops_by_operation(model, image_size).items():
            flops[_kind(str(operation).replace("aten.", "aten::"))] += batch_size * count
        whole = sum(seconds.values())
        shares = {kind: flops[kind] / seconds[kind] / peak for kind in ("convolution", "linear") if seconds[kind]}
        results.append(
            {"network": model, "batch_size": batch_size, "image_size": image_size, "seconds": seconds}
            | {"share_of_step": {kind: value / whole for kind, value in seconds.items()}, "share_of_peak": shares}
        )
        cells = [f"{value / whole:.2f}" for value in seconds.values()]
        near = [f"{shares[kind]:.2f}" if kind in shares else "" for kind in ("convolution", "linear")]
        rows.append((f"{model} {image_size}, batch {batch_size}", f"{1e3 * whole:,.1f}", *cells, *near))
    header = ("network", "step, ms", *results[0]["seconds"], "convolution / peak", "linear / peak")
    print_table(" | ".join(header), rows)
    print(f"\nPeak in matrix products: {peak / 1e9:,.0f} GFLOP/s")
    side_by_side.write_record("step_profile", options, {"peak_flops": peak, "networks": results})


def profiled(model: str, batch_size: int, image_size: int, device: str) -> dict[str, float]:
    """Seconds of a step in each kind of operation, and on a GPU those in which it waits for the next."""
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # as train.py does on a GPU
    net = ours(model)[0].to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    images = torch.rand(batch_size, 1, image_size, image_size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def steps(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(device)
        return (time.perf_counter() - begun) / count

    steps(WARM_UP)
    whole = steps(PROFILED) if device == "cuda" else 0.0
    activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU}
    with profile(activities=activities) as profiler:
        steps(PROFILED)
    seconds = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.key_averages():
        if device == "cuda" and event.device_type != DeviceType.CPU:
            continue  # kernels, which their operations count already
        microseconds: Any = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        seconds[_kind(event.key)] += microseconds / 1e6 / PROFILED
    if device == "cuda":  # a GPU's gaps between kernels, without the profiler, which would make them longer
        seconds["waiting"] = max(0.0, whole - sum(seconds.values()))
    return seconds


def _kind(operation: str) -> str:
    found = (kind for kind, parts in KINDS.items() if any(part in operation.lower() for part in parts))
    return next(found, "other")


def _peak(device: str) -> float:
    """Floating-point operations a second, the best of ten."""
    multiply, operations = matrix_product(device, torch.bfloat16 if device == "cuda" else torch.float32)

    def finish() -> None:
        multiply()
        synchronize(device)

    return operations / min(timeit.repeat(finish, number=1, repeat=10))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.step_profile", main))
