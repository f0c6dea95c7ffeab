"""Whether training in bfloat16 reaches float32's test accuracy, and what it saves in time.

Each network is trained by train.py in either precision in turn, with the same seeds, on all training images; the test
accuracy is measured once, at the end. The two are alike if chance makes such a difference in more than one of twenty
pairs (Student's t, with the seeds' pooled deviation); that proves no equality.

Command: python -m benchmarks.precision --data_dir DIR
"""

import math
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

from benchmarks.harness import side_by_side
from benchmarks.harness.side_by_side import print_table, ratios, spread, train_in_background, trained
from errors import run_program
from runs.differences import LEVEL, critical

PRECISIONS = ("32", "bf16-mixed")
# Six times 50 batches of 32; half of the test images, which take as long.
FIRST_STEPS = ["--max_epochs", "6", "--trainer.limit_train_batches", "50", "--batch_size", "32"]
FIRST_STEPS += ["--trainer.limit_test_batches", "0.5"]

# Name for the table, and flags for train.py.
NETWORKS = {
    "lenet": ("LeNet, 28 pixels", ["--model", "lenet", "--max_epochs", "3"]),
    # Without "he", so few steps leave it near chance, where there is nothing to compare.
    "vgg11_small": (
        "VGG-11 / 8, 32 pixels",
        ["--model", "vgg11_small", "--image_size", "32", "--max_epochs", "3", "--model.initialization", "he"],
    ),
    # The recipes at their own image sizes, the first 300 steps.
    "alexnet": ("AlexNet, 224 pixels", ["--model", "alexnet", *FIRST_STEPS]),
    "nin": ("NiN, 224 pixels", ["--model", "nin", *FIRST_STEPS]),
    "googlenet": ("GoogLeNet, 96 pixels", ["--model", "googlenet", *FIRST_STEPS]),
    "vgg11_eighth": (
        "VGG-11 / 8, 224 pixels",
        ["--model", "vgg11_small", *FIRST_STEPS, "--model.initialization", "he"],
    ),
    # Seeds of NiN's first 300 steps differ by more than the precisions can; this is long enough, and cheap.
    "small_nin": ("NiN, 67 pixels", ["--model", "small/nin", "--trainer.limit_train_batches", "312"]),
}


def pooled_deviation(first: Sequence[float], second: Sequence[float]) -> float:
    """Standard deviation within two samples of the same size; 0 where each is a single value."""
    if len(first) < 2:
        return 0.0
    return math.sqrt((statistics.variance(first) + statistics.variance(second)) / 2)


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means, deviations and ratios of one network's runs, equally many in either precision."""
    plain, bf16 = ([run["accuracy"] for run in runs[precision]] for precision in PRECISIONS)
    difference = abs(statistics.mean(bf16) - statistics.mean(plain))
    deviation = pooled_deviation(plain, bf16)
    enough = len(plain) > 1
    limit = critical(LEVEL, 2 * len(plain) - 2) if enough else math.nan
    return {
        "seeds": len(plain),
        "mean_accuracy": {"32": statistics.mean(plain), "bf16-mixed": statistics.mean(bf16)},
        "deviation": {"32": statistics.stdev(plain), "bf16-mixed": statistics.stdev(bf16)} if enough else None,
        "difference": difference,
        "pooled_deviation": deviation,
        # Whether chance makes such a difference in more than one of twenty pairs, which proves no equality.
        "agree": difference <= limit * deviation * math.sqrt(2 / len(plain)) if enough else None,
        "times_as_fast": ratios(runs["bf16-mixed"], runs["32"], "images_per_second"),
    }


def main() -> None:
    """Train, seed by seed, while there is time."""
    parser = side_by_side.Parser(__doc__, budget=300, flags=True)
    parser.add_argument("--networks", nargs="+", default=["lenet", "vgg11_small"], choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=3, help="runs in each precision, at most (default: %(default)s)")
    parser.add_argument("--background", action="store_true", help="lowest priority, one thread; the times say nothing")
    parser.add_argument("--update", action="store_true", help="leave other networks in the record as they are")
    options = parser.parse_args()
    if options.background:
        train_in_background()
    networks = dict(NETWORKS[name] for name in options.networks)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {kind: [] for kind in PRECISIONS} for name in networks}
    took = dict.fromkeys(networks, 0.0)
    begun = time.monotonic()
    for seed, name in product(range(options.seeds), networks):
        start = time.monotonic()
        if seed and start - begun + took[name] > options.seconds:
            continue
        for precision in PRECISIONS:
            settings = ["--val_size", "0", "--precision", precision, "--seed", str(seed)]
            record = trained([*networks[name], *settings, *options.single])
            run = {"seed": seed, "accuracy": record["test"]["accuracy"], "seconds": record["fit_seconds"]}
            run["losses"] = [epoch["train/loss"] for epoch in record["epochs"]]
            runs[name][precision].append(run | {"images_per_second": record["images_per_second"]})
        took[name] = max(took[name], time.monotonic() - start)
    results, rows = [], []
    for name, flags in networks.items():
        result = compared(runs[name])
        plain, bf16 = (100 * result["mean_accuracy"][precision] for precision in PRECISIONS)
        points = f"{bf16 - plain:+.2f} ({100 * result['pooled_deviation']:.2f})"
        verdict = {True: "yes", False: "no", None: "one seed"}[result["agree"]]
        cells = (f"{plain:.2f} %", f"{bf16:.2f} %", points, verdict, spread(result["times_as_fast"]))
        rows.append((name, *cells, result["seeds"]))
        result = {"network": name, "flags": flags, "runs": runs[name], "compared": result}
        result |= {"measured": side_by_side.occasion("precision", options.place), "background": options.background}
        results.append(result)
    header = "network | test accuracy, 32 | bf16-mixed | difference (pooled deviation), points | alike"
    print_table(f"{header} | x times as fast | seeds", rows)
    if options.update:
        old = side_by_side.recorded("precision", options) or []
        results = [result for result in old if result["network"] not in networks] + results
    side_by_side.write_record("precision", options, results)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.precision", main))
