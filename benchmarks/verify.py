"""Trains a row of the READMEs' tables again, and says whether the result agrees with the records: PASS or FAIL.

    python -m benchmarks.verify fast/30min            # a recipe's own row, or all of its rows if it has none
    python -m benchmarks.verify fast/30min-all-36     # a row with flags: recipe and suffix, as entries.yaml has them
    python -m benchmarks.verify --all --minutes 60    # the cheapest first, as many as fit in the time

A row passes if its new test accuracy lies in the band of its records: where a further run of the same recipe lies with
a probability of 99 %. The deviation between seeds is taken from the row's runs and, as if from two more, from the other
rows of its family. (Of the records, each compared with the others of its row, one in a hundred lies outside.) The seed
is one that has no record. Further flags, such as --data_dir, go to each `train.py`. Exit code 1 if a row fails.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from itertools import count
from typing import Any

from benchmarks.harness.side_by_side import RESULTS, print_table, trained
from benchmarks.readme.entries import Entry, Results, read_entries, read_results
from benchmarks.readme.rounding import duration
from benchmarks.results import estimate
from errors import OneLineParser, UserError, run_program
from runs.differences import critical

CHANCE = 0.01  # of a sound run outside its band
BORROWED = 1  # degree of freedom that the family's deviation has beside the row's own


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    return run_program("benchmarks.verify", lambda: _run(arguments))


def band(accuracies: Sequence[float], usual: float) -> tuple[float, float]:
    """The range in which a new run's accuracy is expected.

    Args:
        accuracies: Those of the recorded runs.
        usual: The deviation between seeds of rows like it.
    """
    mean, freedom = statistics.fmean(accuracies), len(accuracies) - 1 + BORROWED
    squares = sum((accuracy - mean) ** 2 for accuracy in accuracies) + BORROWED * usual**2
    half = critical(CHANCE, freedom) * math.sqrt(squares / freedom * (1 + 1 / len(accuracies)))
    return max(0.0, mean - half), min(1.0, mean + half)


def usual_deviation(rows: Sequence[Sequence[float]]) -> float:
    """The median deviation between seeds over rows with several seeds.

    Raises:
        UserError: If there are none.
    """
    deviations = [statistics.stdev(row) for row in rows if len(row) > 1]
    if not deviations:
        raise UserError("no row has records of two seeds or more to make a band from")
    return statistics.median(deviations)


def kin(entry: Entry, results: Results) -> list[list[float]]:
    """The accuracies of the other rows of its family; if none has two seeds, of all but the ablation's."""
    others = [(other, [run.accuracy for run in runs]) for (other, _), runs in results.runs.items() if other != entry]
    same = [row for other, row in others if other.family == entry.family]
    if max(map(len, same), default=0) < 2:  # in the ablation some seeds learn nothing
        return [row for other, row in others if other.family != "ablation"]
    return same


def _run(arguments: list[str]) -> int:
    options, results = _parse(arguments), read_results(RESULTS)
    entries = [entry for name in options.names for entry in _named(name)] if options.names else read_entries()
    chosen = [entry for entry in dict.fromkeys(entries) if results.of(entry, options.accelerator)]
    if not chosen:
        raise UserError(f"there are no records of {', '.join(options.names)} on a {options.accelerator} to verify")
    seconds = {entry: _seconds(entry, results, options.accelerator) for entry in chosen}
    left, rows, failed = 60 * options.minutes, [], 0
    for entry in sorted(chosen, key=seconds.__getitem__):
        if seconds[entry] > left:
            known = math.isfinite(seconds[entry])
            why = f"it would take {duration(seconds[entry])}" if known else "nobody has timed it alone"
            print(f"{entry.name}: left out, as {why}", flush=True)
            continue
        left -= seconds[entry]
        row, record = _verify(entry, results, options)
        failed += row[-1] == "FAIL"
        print(f"{entry.name}: {row[-1]}", flush=True)
        rows.append(row)
    if not rows:
        raise UserError("nothing fits in the time; give more --minutes")
    print()
    print_table("entry | seed | test accuracy | band | seconds of training | verdict", rows)
    print(f"\n{_place(record)}\n{'FAIL' if failed else 'PASS'}")
    return int(failed > 0)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m benchmarks.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="recipes or rows; patterns such as best/* too")
    parser.add_argument("--all", action="store_true", help="every row that has records")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time budget (default: none)")
    parser.add_argument("--seed", type=int, help="seed to train (default: the first one without a record)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    options, flags = parser.parse_known_args(arguments)
    options.flags = flags
    if options.all == bool(options.names):
        raise UserError("name the recipes to verify, or give --all (python -m benchmarks.verify --help)")
    if not options.minutes > 0:
        raise UserError(f"--minutes must be above 0, got {options.minutes:g}")
    return options


def _named(name: str) -> list[Entry]:
    """The rows of that name: a recipe's own, without those of the recipe with flags, if it has one."""
    entries = read_entries(wanted=[name])
    return [entry for entry in entries if entry.recipe == name and not entry.suffix] or entries


def _verify(entry: Entry, results: Results, options: argparse.Namespace) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Train an entry; returns its line of the table and its record."""
    recorded = results.of(entry, options.accelerator)
    known, seeds = [run.accuracy for run in recorded], {run.seed for run in recorded}
    seed = next(one for one in count() if one not in seeds) if options.seed is None else options.seed
    flags = ["--model", entry.recipe, *entry.flags, "--seed", str(seed), "--accelerator", options.accelerator]
    low, high = band(known, usual_deviation(kin(entry, results)))
    print(f"{entry.name}, seed {seed}: training", flush=True)
    record = trained([*flags, "--devices", "1", *options.flags])
    accuracy, images = record["test"]["accuracy"], recorded[0].record["test"]["images"]
    if record["test"]["images"] != images:
        raise UserError(f"the row was tested on {images:,} images, this run on {record['test']['images']:,}")
    verdict = "PASS" if low <= accuracy <= high else "FAIL"
    seconds = f"{record['fit_seconds']:.1f}"
    return (entry.name, str(seed), f"{accuracy:.4f}", f"{low:.4f} to {high:.4f}", seconds, verdict), record


def _seconds(entry: Entry, results: Results, device: str) -> float:
    """How long its training may take; infinite if unknown."""
    known = estimate(entry, results, device)
    return math.inf if known is None else known


def _place(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    where = ", ".join(filter(None, (machine.get("gpu"), machine["cpu"], f"{machine['cores']} cores")))
    return f"{where}; precision {record['precision']}; {versions}; commit {record['commit'] or 'unknown'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
