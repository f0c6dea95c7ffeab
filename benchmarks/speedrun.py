"""Seconds of training to a test accuracy, through train.py, as the CIFAR-10 speedruns count them.

The clock runs from the first batch to the last; reading the files, building the network and the test are not counted.
How much longer the first epoch took than the median one, with `--compile` the compilation, is also given. A target is
met if the mean test accuracy over the seeds reaches it. Further recipes: `--entry 94 best/vgg16`. With `--peer`
airbench.py takes part; its first step, without an update, is not counted.

Command: python -m benchmarks.speedrun --data_dir DIR
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import side_by_side
from benchmarks.harness.side_by_side import checked, print_table, trained
from errors import run_program

# Mean test accuracy wanted, in percent, and a recipe.
ENTRIES = {"cpu": [(90.0, "lenet"), (92.0, "fast/1min")], "gpu": [(94.0, "fast/5min"), (95.0, "fast/30min")]}
# Goals: seconds to an accuracy; the GPU is an H200.
LIMITS: dict[str, dict[float, float]] = {"cpu": {90: 25, 92: 120}, "gpu": {94: 10, 95: 40}}


def run(recipe: str, options: Any, seed: int) -> dict[str, Any]:
    """One run of train.py; returns seconds and test accuracy."""
    record = trained(["--model", recipe, "--seed", str(seed), "--val_size", "0", *options.single])
    epochs = [epoch["seconds"] for epoch in record["epochs"]]
    return {
        "seed": seed,
        "seconds": record["fit_seconds"],
        "first_epoch_extra_seconds": max(0.0, epochs[0] - statistics.median(epochs)),
        "epochs": len(epochs),
        "accuracy": record["test"]["accuracy"],
    }


def run_peer(options: Any, seed: int) -> dict[str, Any]:
    """One run of airbench.py; returns seconds and test accuracy."""
    where = ["--accelerator", options.accelerator, "--data_dir", options.data_dir]
    command = ["-m", "benchmarks.peers.airbench", *where, "--seed", str(seed), *options.peer_flags.split()]
    return json.loads(checked(command).splitlines()[-1])


def main() -> None:
    """Run each entry once per seed, all entries in turn."""
    parser = side_by_side.Parser(__doc__, budget=270, flags=True)
    parser.add_argument("--seeds", type=int, default=3, help="runs per entry, at most (default: %(default)s)")
    parser.add_argument("--entry", nargs=2, action="append", metavar=("PERCENT", "RECIPE"), help="instead of our own")
    parser.add_argument("--peer", action="store_true", help="with the airbench-style loop")
    parser.add_argument("--peer_flags", default="", help="its flags, in quotes: --width, --epochs")
    options = parser.parse_args()
    try:
        entries = [(float(accuracy), recipe) for accuracy, recipe in options.entry or ENTRIES[options.accelerator]]
    except ValueError as error:
        parser.error(f"--entry takes a test accuracy in percent, then a recipe: {error}")
    begun = time.monotonic()
    contenders: list[Callable[[int], dict[str, Any]]] = [partial(run, recipe, options) for _, recipe in entries]
    contenders += [partial(run_peer, options)] if options.peer else []
    runs: list[list[dict[str, Any]]] = [[] for _ in contenders]
    for seed in range(options.seeds):
        for contender, done in zip(contenders, runs, strict=True):
            took = [one["wall_seconds"] for one in done]
            if took and time.monotonic() - begun + max(took) > options.seconds:
                continue
            start = time.monotonic()
            result = contender(seed)
            done.append(result | {"wall_seconds": time.monotonic() - start})
    results: list[dict[str, Any]] = []
    rows: list[tuple[Any, ...]] = []
    for (wanted, recipe), done in zip(entries, runs, strict=False):
        accuracy = 100 * statistics.mean(one["accuracy"] for one in done)
        seconds = statistics.mean(one["seconds"] for one in done)
        limit = LIMITS[options.accelerator].get(wanted)
        met = accuracy >= wanted and (limit is None or seconds <= limit)
        cells = (f"{wanted:g} %", Path(recipe).stem, f"{accuracy:.2f} %", f"{seconds:.1f}")
        rows.append((*cells, limit or "", len(done), met))
        results.append(
            {"accuracy_wanted": wanted, "recipe": recipe, "limit_seconds": limit, "runs": done}
            | {"mean_accuracy": accuracy / 100, "mean_seconds": seconds, "met": met}
        )
    if options.peer:
        accuracy, seconds = (statistics.mean(one[key] for one in runs[-1]) for key in ("accuracy", "seconds"))
        rows.append(("", "airbench-style", f"{100 * accuracy:.2f} %", f"{seconds:.1f}", "", len(runs[-1]), ""))
        results.append({"peer": "airbench", "runs": runs[-1], "mean_accuracy": accuracy, "mean_seconds": seconds})
    print_table("wanted | recipe | mean test accuracy | seconds | target | seeds | met", rows)
    side_by_side.write_record("speedrun", options, results)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.speedrun", main))
