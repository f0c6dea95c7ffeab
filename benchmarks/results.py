"""Trains what the tables of README and docs show, within a time budget, and writes tables and plot from the records.

    python -m benchmarks.results --accelerator gpu --hours 8    # the same command continues where it stopped
    python -m benchmarks.results --list                         # what would run, what is done, how long it may take
    python -m benchmarks.results --tables                       # only write tables and plot from the records
    python -m benchmarks.results --check                        # exit 1 and name every file that does not match them

One seed of each entry (entries.yaml) comes first, then the second of each, the cheapest entry first. The record of each
finished run is kept as OUT/runs/NAME-seedN-DEVICE.json; what has one is not repeated unless its recipe has changed.
With --background it trains beside other work, at the lowest priority on one thread, and the records say so: their times
say nothing.
Further flags go to each `train.py`; those that change what is trained need a folder of their own, --out.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jsonargparse import Namespace as Settings

from benchmarks.harness.side_by_side import PROJECT, RESULTS, print_table, train_in_background
from benchmarks.readme import accuracy_time
from benchmarks.readme.entries import TEST_IMAGES, Entry, Results, read_entries, read_results
from benchmarks.readme.rounding import duration
from benchmarks.readme.tables import Language, pages, results_table, written
from errors import OneLineParser, UserError, print_error, run_program
from launch.trainer import precision
from runs.reading import Run, find_runs, matches
from runs.record import write_json
from runs.settings import kind, shaping
from runs.training import INTERRUPTED, STOPPED, Request, names_precision, runs_of, train_one, training_lock

BACKGROUND = "background"  # of runs beside other work: a key of their records, an empty file in their folders


class Job(NamedTuple):
    """One run to make."""

    entry: Entry
    seed: int

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.entry.name}, seed {self.seed}"

    def target(self, options: argparse.Namespace) -> Path:
        """Where its record is kept."""
        return options.out / "runs" / f"{self.entry.name}-seed{self.seed}-{options.accelerator}.json"

    @property
    def wanted(self) -> dict[str, Any]:
        """The settings that identify its runs."""
        return shaping(self.entry.config)

    def runs(self, options: argparse.Namespace) -> list[Run]:
        """Its runs that were started, finished or not."""
        found = runs_of(Request(log_dir=options.log_dir), self.entry.recipe, self.wanted)
        return [run for run in found if run.seed == self.seed]


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    return run_program("benchmarks.results", lambda: _run(arguments), INTERRUPTED)


def _run(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.check or options.tables:
        return _tables(options)
    jobs = _jobs(read_entries(options.families, options.recipes, options.flags), options)
    if options.list:
        _list(jobs, options)
        return 0
    code = _train(jobs, options)
    _tables(options)
    return code


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m benchmarks.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--hours", type=float, help="time budget (default: until all is done)")
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME", help="only these: reproduction, best, ...")
    parser.add_argument("--recipes", nargs="+", default=[], metavar="NAME", help="only these, best/* for a folder")
    parser.add_argument("--seeds", type=int, help="at most this many of each (default: as entries.yaml says)")
    parser.add_argument("--background", action="store_true", help="lowest priority, one thread; gives no training time")
    parser.add_argument("--list", action="store_true", help="train nothing, show what would be trained")
    parser.add_argument("--tables", action="store_true", help="train nothing, write tables and plot")
    parser.add_argument("--check", action="store_true", help="write nothing, compare tables and plot with the records")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records (default: benchmarks/results)")
    parser.add_argument("--log_dir", type=Path, help="folder of the runs (default: logs/results-DEVICE)")
    options, flags = parser.parse_known_args(arguments)
    options.flags, options.ours = tuple(flags), options.out.resolve() == RESULTS
    if flags and not flags[0].startswith("--"):
        raise UserError(f"{flags[0]!r} is not a flag (python -m benchmarks.results --help)")
    if flags and (options.check or options.tables) and options.ours:
        raise UserError(f"{flags[0]} is unknown, or a flag of train.py, which is not started here")
    if options.hours is not None and not options.hours > 0:
        raise UserError(f"--hours must be above 0, got {options.hours:g}")
    if options.seeds is not None and options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    # Runs are told apart by what they compute, not by the device: each has a folder of its own.
    options.log_dir = options.log_dir or Path("logs", f"results-{options.accelerator}")
    return options


def _jobs(entries: list[Entry], options: argparse.Namespace) -> list[Job]:
    """What there is to train, in order, whether done or not.

    Raises:
        UserError: If the flags would change what the READMEs' records stand for.
    """
    if options.flags and options.ours:
        for plain, entry in zip(read_entries(options.families, options.recipes), entries, strict=True):
            own, wanted = shaping(plain.config), shaping(entry.config)
            names = sorted(name for name in own.keys() | wanted.keys() if own.get(name) != wanted.get(name))
            if changed := [name for name in names if own.get(name) not in kind(name).left_open]:
                flags = " ".join(options.flags)
                raise UserError(f"{flags} changes {changed[0]} of {entry.recipe}; name a folder with --out")
    if not entries:
        raise UserError("none of these recipes belongs to the families; python -m benchmarks.results --list shows all")
    entries = sorted(entries, key=lambda entry: entry.cost)
    counts = {entry: min(entry.seeds, options.seeds or entry.seeds) for entry in entries}
    return [Job(entry, seed) for seed in range(max(counts.values())) for entry in entries if seed < counts[entry]]


def _train(jobs: list[Job], options: argparse.Namespace) -> int:
    """Run what is missing; returns the exit code."""
    end = time.monotonic() + 3600 * options.hours if options.hours else None
    failed = []
    if options.background:
        train_in_background()
    with training_lock(options.log_dir):
        for job in jobs:
            if _recorded(job, options) or _keep(job, options):  # the run may have finished without its record
                continue
            if _lacks_bfloat16(job, options):
                failed.append(f"{job.title} needs bfloat16, which this device lacks; train it elsewhere")
                continue
            flags = [*job.entry.flags, "--accelerator", options.accelerator, "--devices", "1"]
            request = Request(log_dir=options.log_dir, flags=flags)
            seconds = max(0.0, end - time.monotonic()) if end else None
            code = STOPPED[0]
            if seconds != 0:
                try:
                    code = train_one(request, job.entry.recipe, job.seed, job.wanted, seconds)
                finally:
                    if options.background:  # for later parts of the run, which may have the machine to themselves
                        for run in job.runs(options):
                            (run.folder / BACKGROUND).touch()
            if code in STOPPED and end and time.monotonic() >= end:
                print("Time is up; the same command continues from here.", flush=True)
                break
            if code in STOPPED:  # from outside
                return 128 + signal.SIGTERM
            if code:
                failed.append(f"{job.title} was not finished (exit code {code}); see above")
            elif not _keep(job, options):
                failed.append(
                    f"{job.title} did not run as wanted, maybe in another precision, which --precision would set"
                )
    for failure in failed:
        print_error("benchmarks.results", failure)
    return 1 if failed else 0


def _lacks_bfloat16(job: Job, options: argparse.Namespace) -> bool:
    """Whether the job's recipe computes in bfloat16, and train.py would take float32 on this device."""
    wanted = job.wanted.get("trainer.precision")
    trainer = Settings(precision=wanted, accelerator=options.accelerator, devices=1)
    return wanted != "32-true" == precision(trainer, names_precision(options.flags), None)[0]


def _recorded(job: Job, options: argparse.Namespace) -> bool:
    path = job.target(options)
    return path.is_file() and matches(find_runs([path])[0], job.wanted)


def _keep(job: Job, options: argparse.Namespace) -> bool:
    """Copy the record of the job's run, if that is finished.

    Raises:
        UserError: If it is of data other than the READMEs', and would lie beside their records.
    """
    finished = [run for run in job.runs(options) if run.finished]
    if not finished:
        return False
    record, beside = finished[-1].record, options.background or (finished[-1].folder / BACKGROUND).exists()
    whole = record["train_images"] == job.entry.images and record["test"]["images"] == TEST_IMAGES
    if not whole and options.ours:
        raise UserError(f"{job.title} was not trained on the whole data set; give its record another folder with --out")
    path = job.target(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record | ({BACKGROUND: True} if beside else {}))
    print(f"Record: {path}", flush=True)
    return True


def _tables(options: argparse.Namespace) -> int:
    """Write tables and plot, or with --check name those that do not match the records; returns the exit code.

    For records in another folder the tables are printed instead.
    """
    # What may be given for our own folder, such as --data_dir, changes no result and belongs in no page.
    results = read_results(options.out, () if options.ours else options.flags)
    for path in results.stale:
        print(f"{path.name} is left out: its recipe has changed since, or entries.yaml has no such entry")
    texts = {path: written(path, results, options.out) for path in pages()} if options.ours or options.check else {}
    texts = {path: text for path, text in texts.items() if text != path.read_text(encoding="utf-8")}
    picture = accuracy_time.PICTURE if options.ours else options.out / accuracy_time.PICTURE.name
    found = accuracy_time.points(results)
    drawn = not found or accuracy_time.is_current(found, picture)
    if options.check:
        stale = [*texts, *([] if drawn else [picture])]
        for path in stale:
            print(f"{path.name} is stale or was changed by hand: python -m benchmarks.results --tables")
        return 1 if stale else 0
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(f"Wrote {path.relative_to(PROJECT)}")
    if not options.ours:
        for family in dict.fromkeys(entry.family for entry, _ in results.runs):
            print(f"\n{family}\n\n{results_table(family, results, Language(0, ' to '))}")
    if not drawn:
        accuracy_time.draw(found, picture)
        print(f"Wrote {picture}")
    return 0


def _list(jobs: list[Job], options: argparse.Namespace) -> None:
    """Show what is done, and what would be trained in which order."""
    results = read_results(options.out, options.flags)
    rows, known, unknown = [], 0.0, 0
    for job in jobs:
        left = estimate(job.entry, results, options.accelerator)
        state = "to do"
        if _recorded(job, options):
            state, left = "done", 0.0
        elif runs := job.runs(options):
            state, epochs = "stopped", len(runs[-1].record["epochs"])
            if runs[-1].finished:
                state, left = "to copy", 0.0
            elif left is not None:
                left *= 1 - epochs / job.entry.config["trainer"]["max_epochs"]
        rows.append((job.entry.family, job.entry.name, job.seed, state, "?" if left is None else duration(left)))
        known, unknown = known + (left or 0.0), unknown + (left is None)
    print_table("family | entry | seed | state | time left", rows)
    print(f"\n{duration(known)} left{f', and {unknown} runs of unknown time' if unknown else ''}")


def estimate(entry: Entry, results: Results, accelerator: str) -> float | None:
    """Seconds of training, from runs of the same network by this recipe on the same kind of device, or None."""
    net = entry.config["model"]["net"]
    rates = [
        run.record["fit_seconds"] / (len(run.record["epochs"]) * run.record["train_images"])
        for (other, device), runs in results.runs.items()
        if (other.recipe, other.config["model"]["net"], device) == (entry.recipe, net, accelerator)
        for run in runs
        if BACKGROUND not in run.record
    ]
    return fmean(rates) * entry.images * entry.config["trainer"]["max_epochs"] if rates else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
