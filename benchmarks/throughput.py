"""Training speed of each network at its tutorial size, side by side with the loops people use.

Everything is in it: loading, resizing, forward, backward, optimiser. The README beside this file says what is compared.
The same run measures the machine's peak in matrix products and the peak memory of each process (on the CPU without its
loader's workers), beside the one that memory.py calculates for ours, without and with activation checkpointing.

If memory does not hold all at once, they take part in groups, with ours in each. With `--update` only the networks
that are measured are replaced in the record; each of its results says when and how it was measured.

With `--confirm` a second method, which shares nothing with the turns, times ours and the tutorial's loop: whole runs of
a few and of more batches, whose difference has neither start nor end in it.

Command: python -m benchmarks.throughput --data_dir DIR
"""

import atexit
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import side_by_side
from benchmarks.harness.our_turns import StepTurns, command, float32
from benchmarks.harness.side_by_side import Contestant, Missing, contest, median, print_table, ratios, spread
from benchmarks.memory import training_bytes
from benchmarks.peers.plain_loops import build
from cli.recipes import read_recipe
from datamodules.files.finding import load, prepare
from errors import print_error, run_program
from launch.trainer import cpu_has_bfloat16

NETWORKS = ("lenet", "alexnet", "vgg11", "nin", "googlenet")
SHARES = {"lenet": 0.1, "alexnet": 0.22, "vgg11": 0.3, "nin": 0.22, "googlenet": 0.16}  # of the time budget
BF16, COMPILED, TUTORIAL = "ours_bf16", "ours_compiled", "tutorial"
PEERS = (BF16, TUTORIAL, "references", "d2l", "timm")
PEAK, BF16_PEAK = "matmul", "matmul_bf16"
CONFIRMED_BATCHES, CONFIRMED_SECONDS = 12, 40.0  # least length of the difference of two runs; repeated to this time
PROCESS_BYTES = 2**30  # what a contestant's process takes besides its tensors
# Goals: how many times the tutorial's images/s, and what share of the peak.
TARGETS: dict[str, dict[str, tuple[float, float | None]]] = {
    "cpu": dict(alexnet=(1.6, 0.95), vgg11=(2, 0.95), nin=(2.4, 0.95), googlenet=(1.7, 0.75), lenet=(2.4, None)),
    "gpu": dict(alexnet=(10, 0.4), vgg11=(10, 0.6), nin=(10, 0.3), googlenet=(10, 0.3), lenet=(10, None)),
}


def training_flops(model: str, image_size: int) -> int:
    """Floating-point operations of forward and backward pass for one image."""
    return sum(training_flops_by_operation(model, image_size).values())


def training_flops_by_operation(model: str, image_size: int) -> dict[Any, int]:
    """The same for each of PyTorch's operations, counted on tensors without data.

    The gradient of the images themselves is not needed and not counted.
    """
    net, _ = build(model)
    net = net.to("meta")
    with FlopCounterMode(display=False) as counter:
        logits = net(torch.empty(2, 1, image_size, image_size, device="meta"))
        F.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device="meta")).backward()
    return {operation: count // 2 for operation, count in counter.get_flop_counts()["Global"].items()}


def main() -> int:
    """Run one contest for each network; returns 1 if one of them could not be measured."""
    parser = side_by_side.Parser(__doc__, budget=600, flags=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="recipes (default: all five)")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=(*PEERS, COMPILED))
    parser.add_argument("--batch_size", type=int, nargs="+", help="instead of each recipe's own; several in turn")
    parser.add_argument("--turn", type=float, default=2.0, help="seconds per turn, at least (default: %(default)g)")
    parser.add_argument("--confirm", action="store_true", help="time ours and the tutorial's loop a second way as well")
    parser.add_argument("--update", action="store_true", help="leave other networks in the record as they are")
    options = parser.parse_args()
    device = options.device
    results, rows = [], []
    failed: list[str] = []
    settings = [(model, size) for model in options.networks for size in options.batch_size or [None]]
    shares = sum(SHARES.get(model, 0.2) for model, _ in settings)
    for model, wanted in settings:
        recipe = read_recipe(model)
        batch_size, image_size = wanted or recipe["data"]["batch_size"], recipe["data"]["image_size"]
        budget = options.seconds * SHARES.get(model, 0.2) / shares
        try:
            result = measure(model, batch_size, device, budget, options)
        except side_by_side.Ended as reason:  # often out of memory; the other networks go on
            failed.append(f"{model} was not measured: {reason}")
            continue
        result |= {"training_flops_per_image": training_flops(model, image_size), "image_size": image_size}
        goal, goal_share = TARGETS[options.accelerator].get(model, (None, None))
        result |= {"target_ratio": goal, "target_share_of_peak": goal_share}
        if options.confirm:
            result["by_difference"] = confirmed(result, options)
        for entry in result["contestants"]:
            peak = result["peak_flops_bf16"] if entry["contestant"] == BF16 else result["peak_flops"]
            share = entry["images_per_second"] * result["training_flops_per_image"] / peak
            entry["share_of_peak"] = share
            if entry["contestant"] in ("ours", BF16):
                precision = "bf16-mixed" if device == "cuda" or entry["contestant"] == BF16 else "32"
                sizes = [training_bytes(model, batch_size, precision, checkpointing) for checkpointing in (False, True)]
                entry |= {"calculated_memory_bytes": sizes[0], "calculated_memory_bytes_checkpointed": sizes[1]}
            else:
                sizes = []
            ratio = entry.get("ours_over_this")
            speeds = (f"{entry['images_per_second']:,.0f}", spread(ratio) if ratio else "", f"{share:.2f}")
            memory = (f"{entry['peak_memory_bytes'] / 2**30:.2f}", " / ".join(f"{size / 2**30:.2f}" for size in sizes))
            epoch = f"{60_000 / entry['images_per_second']:,.1f}"
            network = f"{model} {image_size}, batch {batch_size}"
            rows.append((network, entry["contestant"], *speeds, epoch, *memory, entry["rounds"]))
        for name, why in result["missing"].items():
            print(f"{model}: without {name}: {why}", flush=True)
        results.append(result | {"measured": side_by_side.occasion("throughput", options.place)})
    header = "network | loop | images/s | ours is x times | share of peak | s/60,000 | peak GiB"
    print_table(f"{header} | calculated / checkpointed | rounds", rows)
    print()
    for result in results:
        if second := result.get("by_difference"):
            shown = ", ".join(f"{name} {rate:,.1f}" for name, rate in second["images_per_second"].items())
            print(f"{result['network']}, whole runs taken apart by difference, images/s: {shown}")
    for key, kind in (("peak_flops", "bfloat16" if device == "cuda" else "float32"), ("peak_flops_bf16", "bfloat16")):
        if peaks := [result[key] for result in results if key in result]:
            print(f"Peak in matrix products ({kind}): {statistics.median(peaks) / 1e9:,.0f} GFLOP/s")
    measured = bool(results)
    if options.update or failed:  # what a record says of other networks, or of those that failed, stays
        new = {(result["network"], result["batch_size"]): result for result in results}
        # But not of another machine.
        old = [
            one
            for one in side_by_side.recorded("throughput", options) or []
            if side_by_side.same_machine(one["measured"]["machine"], options.place)
        ]
        results = [new.pop((result["network"], result["batch_size"]), result) for result in old] + list(new.values())
    if measured:
        side_by_side.write_record("throughput", options, results)
    for failure in failed:
        print_error("benchmarks.throughput", failure)
    return int(bool(failed))


def measure(model: str, batch_size: int, device: str, budget: float, options: Any) -> dict[str, Any]:
    """One network's contests: ours against all the others, or as many at a time as fit in memory."""
    bf16 = BF16 in options.peers and device == "cpu" and cpu_has_bfloat16()
    groups = _groups(options.peers, training_bytes(model, batch_size), _memory(device))
    turns: dict[str, list[dict[str, Any]]] = {"ours": []}
    first_rounds: dict[str, int] = {}  # round of ours in which each of the others first took part
    missing: dict[str, str] = {}
    for number, peers in enumerate(groups):
        matrices = [PEAK, *([BF16_PEAK] if bf16 else [])] if number == 0 else []
        first_rounds |= dict.fromkeys(peers, len(turns["ours"]))
        reports, absent = _contest(model, batch_size, device, [*peers, *matrices], budget / len(groups), options)
        for name, values in reports.items():
            turns.setdefault(name, []).extend(values)
        missing |= absent
    if PEAK in missing:
        raise side_by_side.Ended(missing[PEAK])
    peaks = {name: max(turn["rate"] for turn in turns.pop(name)) for name in (PEAK, BF16_PEAK) if name in turns}
    entries: list[dict[str, Any]] = []
    for name, values in turns.items():
        memory = max(report["peak_memory_bytes"] for report in values)
        entry = {"contestant": name, "rounds": len(values), "images_per_second": median(values)}
        entry |= {"peak_memory_bytes": memory, "turns": values}
        if name != "ours":
            first = first_rounds[name]
            ours = turns["ours"][first : first + len(values)]
            entry |= {"ours_over_this": ratios(ours, values), "first_round_of_ours": first}
        entries.append(entry)
    _add_bf16_over_tutorial({entry["contestant"]: entry for entry in entries})
    result = {"network": model, "batch_size": batch_size, "contestants": entries, "missing": missing}
    names = {PEAK: "peak_flops", BF16_PEAK: "peak_flops_bf16"}
    return result | {names[name]: peak for name, peak in peaks.items()}


def _add_bf16_over_tutorial(entries: dict[str, dict[str, Any]]) -> None:
    """Note how many times the tutorial's loop ours in bfloat16 is, where they took turns in the same rounds."""
    if {BF16, TUTORIAL} <= entries.keys():
        bf16, tutorial = entries[BF16], entries[TUTORIAL]
        if all(bf16[name] == tutorial[name] for name in ("first_round_of_ours", "rounds")):
            bf16["over_tutorial"] = ratios(bf16["turns"], tutorial["turns"])


def confirmed(result: dict[str, Any], options: Any) -> dict[str, Any]:
    """Images per second of ours and of the tutorial's loop from whole runs of few and of more batches.

    Args:
        result: What the turns gave for this network.
        options: Those of the command.
    """
    model, batch_size = result["network"], result["batch_size"]
    speeds = {one["contestant"]: one["images_per_second"] for one in result["contestants"]}
    settings = ["--model", model, "--batch_size", str(batch_size)]
    train = [str(side_by_side.PROJECT / "train.py"), "fit", *options.single, *settings]
    logs = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, logs, ignore_errors=True)
    ours = [*train, "--val_size", "0", "--max_epochs", "1", "--log_dir", logs]
    limit = "--trainer.limit_train_batches"
    runs = {
        "ours": ([*ours, *float32(options.device)], limit),
        BF16: ([*ours, "--precision", "bf16-mixed"], limit),
        TUTORIAL: (_plain_loop(TUTORIAL, settings, options), "--steps"),
    }
    epoch = len(load(prepare(Path(options.data_dir)), "train")[1]) // batch_size
    rates: dict[str, float] = {}
    steps: dict[str, list[int]] = {}
    for name, (run, flag) in runs.items():
        if name not in speeds:
            continue
        batch_seconds = batch_size / speeds[name]
        more = min(max(CONFIRMED_BATCHES, math.ceil(CONFIRMED_SECONDS / batch_seconds)), epoch - 6)
        seconds = [
            _whole_run(run, flag, 6 + more) - _whole_run(run, flag, 6)
            for _ in range(min(5, math.ceil(CONFIRMED_SECONDS / (more * batch_seconds))))
        ]
        rates[name], steps[name] = more * batch_size / statistics.fmean(seconds), [6, 6 + more, len(seconds)]
    return {"images_per_second": rates, "batches_and_repetitions": steps}


def _whole_run(run: Sequence[str], flag: str, batches: int) -> float:
    """Seconds of a process from its start to its end; its loader's workers may outlive it."""
    command = [sys.executable, *run, flag, str(batches)]
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=side_by_side.PROJECT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _plain_loop(name: str, settings: Sequence[str], options: Any) -> list[str]:
    """Python's arguments for one of the other loops."""
    where = ["--device", options.device, "--data_dir", options.data_dir]
    return ["-m", "benchmarks.peers.plain_loops", name, *settings, *where]


def _memory(device: str) -> float:
    """Bytes that all contestants together may take, as each keeps its own while others have their turn."""
    if device != "cpu":
        return 0.8 * torch.cuda.mem_get_info()[0]
    return 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def _groups(peers: Sequence[str], size: int, memory: float) -> list[list[str]]:
    """The others in groups that, with ours, share the memory.

    Args:
        peers: All of them.
        size: Bytes that each needs for its tensors.
        memory: Bytes that there are.
    """
    fitting = max(1, int(min(memory / (size + PROCESS_BYTES), len(peers) + 1)) - 1)
    return [list(peers[start : start + fitting]) for start in range(0, len(peers), fitting)] or [[]]


def _contest(
    model: str, batch_size: int, device: str, others: Sequence[str], budget: float, options: Any
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    settings = ["--model", model, "--batch_size", str(batch_size)]
    ours = command(StepTurns, options, *settings, "--val_size", "0")
    contestants = {"ours": partial(Contestant, [*ours, *float32(device)])}
    for name in others:
        if name in (BF16, COMPILED):
            compiled = partial(Contestant, [*ours, *float32(device), "--compile"])
            contestants[name] = partial(_in_bf16, ours, device) if name == BF16 else compiled
            continue
        fast = ["--fast"] if device == "cuda" or name == BF16_PEAK else []
        loop = _plain_loop(PEAK if name == BF16_PEAK else name, settings, options)
        contestants[name] = partial(Contestant, [*loop, *fast])
    return contest(contestants, budget, options.turn, least_rounds=5, least_steps=10)


def _in_bf16(ours: list[str], device: str) -> Contestant:
    if device != "cpu":
        raise Missing("ours is in bfloat16 already")
    if not cpu_has_bfloat16():
        raise Missing("this CPU has no instructions for bfloat16")
    return Contestant([*ours, "--precision", "bf16-mixed"])


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.throughput", main))
