"""Seconds of training to a test accuracy, through train.py, as the CIFAR-10 speedruns count them.

The clock runs from the first batch to the last, with everything the Trainer does between them; reading the files,
building the network and the test are outside of it. With `--compile` the compilation is inside, and also given on its
own (the first epoch's time over the median epoch's). A target is met if the mean test accuracy over the seeds reaches
it; nothing is chosen by looking at the test images within a run. Further recipes: `--entry 94 best/vgg16`.

Command: python -m benchmarks.speedrun --data_dir DIR
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import side_by_side
from benchmarks.side_by_side import PROJECT, print_table, run_folder


class Entry(NamedTuple):
    """How one accuracy is reached.

    Attributes:
        accuracy: Mean test accuracy wanted, in percent.
        recipe: For train.py.
    """

    accuracy: float
    recipe: str


ENTRIES = (
    Entry(90, "benchmarks/recipes/lenet_90.yaml"),
    Entry(92, "benchmarks/recipes/vgg_92.yaml"),
)
# Issue: seconds to an accuracy; the GPU is an H200.
LIMITS: dict[str, dict[float, float]] = {"cpu": {90: 25, 92: 120}, "gpu": {94: 10, 95: 40}}


def run(recipe: str, seed: int, options: Any, folder: str) -> dict[str, Any]:
    """One run of train.py; returns seconds and test accuracy."""
    command = [sys.executable, str(PROJECT / "train.py"), "--model", recipe, "--seed", str(seed), "--val_size", "0"]
    command += ["--accelerator", options.accelerator, "--devices", "1", "--data_dir", options.data_dir]
    command += ["--log_dir", folder, *options.flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    records = Path(folder).rglob("record.json")
    record = json.loads(max(records, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8"))
    epochs = [epoch["seconds"] for epoch in record["epochs"]]
    return {
        "seed": seed,
        "seconds": record["fit_seconds"],
        "first_epoch_extra_seconds": max(0.0, epochs[0] - statistics.median(epochs)),
        "epochs": len(epochs),
        "accuracy": record["test"]["accuracy"],
    }


def main() -> None:
    """Run each entry once a seed, all entries in turn."""
    parser = side_by_side.arguments(__doc__ or "", budget=270)
    parser.add_argument("--seeds", type=int, default=3, help="runs an entry, at most (default: %(default)s)")
    parser.add_argument("--entry", nargs=2, action="append", metavar=("PERCENT", "RECIPE"), help="instead of our own")
    parser.add_argument("--flags", default="", help="more flags for train.py, in quotes")
    options = parser.parse_args()
    options.data_dir = str(Path(options.data_dir).resolve())
    place = side_by_side.machine(options.accelerator)
    entries = [Entry(float(accuracy), recipe) for accuracy, recipe in options.entry or []] or list(ENTRIES)
    runs: dict[float, list[dict[str, Any]]] = {entry.accuracy: [] for entry in entries}
    begun = time.monotonic()
    with run_folder() as folder:
        for seed in range(options.seeds):
            for entry in entries:
                took = [one["wall_seconds"] for one in runs[entry.accuracy]]
                if took and time.monotonic() - begun + max(took) > options.seconds:
                    continue
                start = time.monotonic()
                result = run(entry.recipe, seed, options, folder)
                runs[entry.accuracy].append(result | {"wall_seconds": time.monotonic() - start})
    results, rows = [], []
    for entry in entries:
        done = runs[entry.accuracy]
        accuracy = 100 * statistics.mean(one["accuracy"] for one in done)
        seconds = statistics.mean(one["seconds"] for one in done)
        limit = LIMITS[options.accelerator].get(entry.accuracy)
        met = accuracy >= entry.accuracy and (limit is None or seconds <= limit)
        name = Path(entry.recipe).stem
        rows.append((f"{entry.accuracy:g} %", name, f"{accuracy:.2f} %", f"{seconds:.1f}", limit or "", len(done), met))
        results.append(
            {"accuracy_wanted": entry.accuracy, "recipe": entry.recipe, "limit_seconds": limit, "runs": done}
            | {"mean_accuracy": accuracy / 100, "mean_seconds": seconds, "met": met}
        )
    print_table(("wanted", "recipe", "mean test accuracy", "seconds", "target", "seeds", "met"), rows)
    side_by_side.write_record("speedrun", options, place, results)


if __name__ == "__main__":
    main()
