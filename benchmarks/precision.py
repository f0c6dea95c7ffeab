"""Whether training in bfloat16 reaches float32's test accuracy, and what it saves in time.

Narrow networks are trained by train.py with `--precision 32` and `--precision bf16-mixed` in turn, each with the same
seeds: the same initial weights, batches and draws. All training images are used and there is no validation in
between; the test accuracy is measured once, at the end. The two agree if their means differ by no more than twice the
difference's standard error, which is the seeds' pooled deviation times the square root of 2 over their number.

Command: python -m benchmarks.precision --data_dir DIR
"""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.harness import side_by_side
from benchmarks.harness.side_by_side import print_table, run_folder, trained

PRECISIONS = ("32", "bf16-mixed")


class Network(NamedTuple):
    """What is trained.

    Attributes:
        name: For the table.
        flags: For train.py.
    """

    name: str
    flags: tuple[str, ...]


NETWORKS = {
    "lenet": Network("LeNet, 28 pixels", ("--model", "lenet", "--max_epochs", "3")),
    # Without "he", so few steps leave it near chance, where there is nothing to compare.
    "vgg11_small": Network(
        "VGG-11 / 8, 32 pixels",
        ("--model", "vgg11_small", "--image_size", "32", "--max_epochs", "3", "--model.initialization", "he"),
    ),
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
    ratios = [
        second["images_per_second"] / first["images_per_second"]
        for first, second in zip(*(runs[precision] for precision in PRECISIONS), strict=True)
    ]
    enough = len(plain) > 1
    return {
        "seeds": len(plain),
        "mean_accuracy": {"32": statistics.mean(plain), "bf16-mixed": statistics.mean(bf16)},
        "deviation": {"32": statistics.stdev(plain), "bf16-mixed": statistics.stdev(bf16)} if enough else None,
        "difference": difference,
        "pooled_deviation": deviation,
        "agree": difference <= 2 * deviation * math.sqrt(2 / len(plain)) if enough else None,
        "times_as_fast": {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)},
    }


def main() -> None:
    """Train, seed by seed, while there is time."""
    parser = side_by_side.Parser(__doc__, budget=300, flags=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=3, help="runs in each precision, at most (default: %(default)s)")
    options = parser.parse_args()
    shared = ["--val_size", "0", "--accelerator", options.accelerator, "--devices", "1"]
    shared += ["--data_dir", options.data_dir, *options.flags.split()]
    networks = [NETWORKS[name] for name in options.networks]
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {
        network.name: {precision: [] for precision in PRECISIONS} for network in networks
    }
    took = {network.name: 0.0 for network in networks}
    begun = time.monotonic()
    with run_folder() as folder:
        for seed in range(options.seeds):
            for network in networks:
                start = time.monotonic()
                if seed and start - begun + took[network.name] > options.seconds:
                    continue
                for precision in PRECISIONS:
                    arguments = [*network.flags, *shared, "--precision", precision, "--seed", str(seed)]
                    record = trained(arguments, folder)
                    run = {"seed": seed, "accuracy": record["test"]["accuracy"], "seconds": record["fit_seconds"]}
                    runs[network.name][precision].append(run | {"images_per_second": record["images_per_second"]})
                took[network.name] = max(took[network.name], time.monotonic() - start)
    results, rows = [], []
    for network in networks:
        result = compared(runs[network.name])
        plain, bf16 = (100 * result["mean_accuracy"][precision] for precision in PRECISIONS)
        points = f"{bf16 - plain:+.2f} ({100 * result['pooled_deviation']:.2f})"
        verdict = {True: "yes", False: "no", None: "one seed"}[result["agree"]]
        rows.append(
            (
                network.name,
                f"{plain:.2f} %",
                f"{bf16:.2f} %",
                points,
                verdict,
                side_by_side.spread(result["times_as_fast"]),
                result["seeds"],
            )
        )
        results.append(
            {"network": network.name, "flags": list(network.flags), "runs": runs[network.name], "compared": result}
        )
    header = (
        "network",
        "test accuracy, 32",
        "bf16-mixed",
        "difference (pooled deviation), points",
        "agree",
        "x times as fast",
        "seeds",
    )
    print_table(header, rows)
    side_by_side.write_record("precision", options, results)


if __name__ == "__main__":
    main()
