"""Training speed of each network at its tutorial size, side by side with the loops people use.

Everything is in it: loading, resizing, forward, backward, optimiser. Ours is the real `train.py` with its defaults; see
plain_loops.py for the others. The same run measures the machine's peak in matrix products, to say how near we are, and
the peak memory of each process (on the CPU without its loader's workers).

Command: python -m benchmarks.throughput --data_dir DIR
"""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import side_by_side
from benchmarks.our_turns import StepTurns, command
from benchmarks.plain_loops import LOOPS, build
from benchmarks.side_by_side import Contestant, contest, median, print_table, ratios, run_folder

NETWORKS = ("lenet", "alexnet", "vgg11", "nin", "googlenet")
SHARES = {"lenet": 0.1, "alexnet": 0.22, "vgg11": 0.3, "nin": 0.22, "googlenet": 0.16}  # of the time budget
PEERS = ("tutorial", "references", "d2l", "timm")
PEAK = "matmul"
# Issue: how many times the tutorial's images/s, and which share of the peak.
TARGETS: dict[str, dict[str, tuple[float, float | None]]] = {
    "cpu": {
        "alexnet": (1.6, 0.9),
        "vgg11": (1.4, 0.8),
        "nin": (1.4, 0.7),
        "googlenet": (1.4, 0.6),
        "lenet": (1.4, None),
    },
    "gpu": {"alexnet": (10, 0.4), "vgg11": (10, 0.6), "nin": (10, 0.3), "googlenet": (10, 0.3), "lenet": (10, None)},
}


def training_flops(model: str, image_size: int) -> int:
    """Floating-point operations of forward and backward pass for one image, counted on tensors without data.

    The gradient of the images themselves is not needed, and not counted.
    """
    net, _ = build(model)
    net = net.to("meta")
    with FlopCounterMode(display=False) as counter:
        logits = net(torch.empty(2, 1, image_size, image_size, device="meta"))
        F.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device="meta")).backward()
    return counter.get_total_flops() // 2


def training_bytes(model: str, batch_size: int, image_size: int, device: str) -> int:
    """Memory that training needs at least, calculated on tensors without data.

    Weights, gradients and Adam's two moments in float32, and what the forward pass keeps for the backward pass, in
    float32 on the CPU and in bfloat16 on a GPU. Workspaces of the convolutions come on top.
    """
    net, _ = build(model)
    for layer in net.modules():
        if isinstance(layer, torch.nn.ReLU):
            layer.inplace = True
    fixed = 16 * sum(parameter.numel() for parameter in net.parameters())
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    net = net.to("meta", dtype)
    weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.empty(batch_size, 1, image_size, image_size, device="meta", dtype=dtype)).sum()
    return fixed + sum(storage.nbytes() for storage in kept.values())


def main() -> None:
    """Run one contest for each network."""
    parser = side_by_side.arguments(__doc__ or "", budget=600)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="recipes (default: all five)")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument(
        "--batch_size", type=int, nargs="+", help="instead of each recipe's own; several are run in turn"
    )
    parser.add_argument("--turn", type=float, default=2.0, help="seconds a turn, at least (default: %(default)g)")
    parser.add_argument("--compile", action="store_true", help="our network compiled")
    options = parser.parse_args()
    device = {"cpu": "cpu", "gpu": "cuda"}[options.accelerator]
    place = side_by_side.machine(options.accelerator)
    results, rows = [], []
    settings = [(model, size) for model in options.networks for size in options.batch_size or [None]]
    shares = sum(SHARES.get(model, 0.2) for model, _ in settings)
    for model, wanted in settings:
        recipe = build(model)[1]
        batch_size, image_size = wanted or recipe["data"]["batch_size"], recipe["data"]["image_size"]
        budget = options.seconds * SHARES.get(model, 0.2) / shares
        result = measure(model, batch_size, device, budget, options)
        result |= {"training_flops_per_image": training_flops(model, image_size), "image_size": image_size}
        result["calculated_memory_bytes"] = training_bytes(model, batch_size, image_size, device)
        peak = result["peak_flops"]
        goal, goal_share = TARGETS[options.accelerator].get(model, (None, None))
        result |= {"target_ratio": goal, "target_share_of_peak": goal_share}
        for entry in result["contestants"]:
            share = entry["images_per_second"] * result["training_flops_per_image"] / peak
            entry["share_of_peak"] = share
            ratio = entry.get("ours_over_this")
            rows.append(
                (
                    f"{model} {image_size}, batch {batch_size}",
                    entry["contestant"],
                    f"{entry['images_per_second']:,.0f}",
                    f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['greatest']:.2f})" if ratio else "",
                    f"{share:.2f}",
                    f"{60_000 / entry['images_per_second']:,.1f}",
                    f"{entry['peak_memory_bytes'] / 2**30:.2f} ({result['calculated_memory_bytes'] / 2**30:.2f})",
                    entry["rounds"],
                )
            )
        for name, why in result["missing"].items():
            print(f"{model}: without {name}: {why}", flush=True)
        results.append(result)
    header = (
        "network",
        "loop",
        "images/s",
        "ours is x times",
        "share of peak",
        "s/60,000",
        "peak GiB (calculated)",
        "rounds",
    )
    print_table(header, rows)
    peaks = statistics.median(result["peak_flops"] for result in results)
    print(f"\nPeak in matrix products ({'bfloat16' if device == 'cuda' else 'float32'}): {peaks / 1e9:,.0f} GFLOP/s")
    side_by_side.write_record("throughput", options, place, results)


def measure(model: str, batch_size: int, device: str, budget: float, options: Any) -> dict[str, Any]:
    """One network's contest."""
    shared = ("--model", model, "--data_dir", str(Path(options.data_dir).resolve()), "--batch_size", str(batch_size))
    with run_folder() as folder:
        ours = command(
            StepTurns,
            *("--accelerator", options.accelerator, "--devices", "1", "--log_dir", folder),
            *("--max_epochs", "100000", "--val_size", "0", *shared),
            *(["--compile"] if options.compile else []),
        )
        contestants = {"ours": partial(Contestant, ours)}
        for name in (*options.peers, PEAK):
            assert name in LOOPS
            fast = ["--fast"] if device == "cuda" else []
            loop = ["-m", "benchmarks.plain_loops", name, "--device", device, *shared, *fast]
            contestants[name] = partial(Contestant, loop)
        turns, missing = contest(contestants, budget, options.turn)
    peak = max(turn["rate"] for turn in turns.pop(PEAK))
    entries = []
    for name, reports in turns.items():
        entry = {
            "contestant": name,
            "rounds": len(reports),
            "images_per_second": median(reports),
            "peak_memory_bytes": max(report["peak_memory_bytes"] for report in reports),
            "turns": reports,
        }
        if name != "ours":
            entry["ours_over_this"] = ratios(turns["ours"], reports)
        entries.append(entry)
    return {
        "network": model,
        "batch_size": batch_size,
        "peak_flops": peak,
        "contestants": entries,
        "missing": missing,
    }


if __name__ == "__main__":
    main()
