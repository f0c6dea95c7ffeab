"""Finished runs side by side: a table, and on request Markdown, CSV and plots; can train what is missing first.

Only light modules are imported here; training happens in processes of its own, each a plain `train.py`.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cli.command import parse_command_line
from cli.flags import FLAGS, take_flag, take_values
from cli.recipes import PROJECT, did_you_mean, resolved
from errors import UserError, print_error, run_program
from runs.reading import Run, find_runs, fold, matches, settings
from runs.report import print_table, write_report

HELP = """\
usage: python compare.py [RUNS...] [--log_dir DIR] [--output DIR]
       python compare.py --train RECIPE... [--seeds N] [--output DIR] [flags of train.py]

Shows finished runs side by side, runs that differ in their seed alone as one line. RUNS are the folders of runs, or
folders that hold some; without any, all runs in the log folder are compared.

  --log_dir DIR      folder of the runs (default: logs)
  --output DIR       also write report.md, runs.csv and plots (PNG) into this folder
  --train RECIPE...  first train what is missing, one run after another, and compare these runs alone; runs that were
                     stopped go on where they were, and finished ones are not repeated
  --seeds N          with --train: the seeds 0 to N-1 of each recipe (default: 1)

All other flags, such as --max_epochs, --accelerator or --data_dir, go to each `python train.py --model RECIPE`."""
NOT_PASSED = {
    "--model": "name the recipes behind --train",
    "--seed": "give their number with --seeds",
    "--seed_everything": "give their number with --seeds",
    "--ckpt_path": "unfinished runs go on by themselves",
    "--print_config": "use train.py",
    "--print_model": "use train.py",
}
INTERRUPTED = "Stopped by Ctrl-C. The same command continues from here."
# Exit codes of a training that was told to stop: before it could save a checkpoint, and after.
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)


@dataclass
class Request:
    """A checked command line.

    Attributes:
        paths: Runs to compare, or folders of runs.
        log_dir: Folder of the runs.
        output: Folder for the report, or None.
        recipes: Recipes to train first.
        seeds: How many seeds of each.
        flags: Flags of train.py.
    """

    paths: list[Path] = field(default_factory=list)
    log_dir: Path = Path("logs")
    output: Path | None = None
    recipes: list[str] = field(default_factory=list)
    seeds: int = 1
    flags: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    return run_program("compare.py", lambda: _run(arguments), INTERRUPTED)


def _run(arguments: list[str]) -> int:
    request = parse(arguments)
    if request is None:
        print(HELP)
        return 0
    return compare(request)


def parse(arguments: list[str]) -> Request | None:
    """Check the arguments; None if help was asked for.

    Raises:
        UserError: For any mistake that can be seen without importing torch.
    """
    request, tokens, own = Request(), list(arguments), ("--log_dir", "--output", "--seeds")
    seeds_given = False
    while tokens:
        token = tokens.pop(0)
        name, has_value, value = token.partition("=")
        if name in ("-h", "--help"):
            return None
        if name == "--train":
            request.recipes += [value] if has_value else take_values(tokens)
            if not request.recipes:
                raise UserError("--train needs the names of recipes: --train lenet alexnet")
        elif name in own:
            if not has_value:
                if not tokens or tokens[0].startswith("--"):
                    raise UserError(f"{name} needs a value (python compare.py --help)")
                value = tokens.pop(0)
            if not value:
                raise UserError(f"{name} needs a value, got ''")
            if name == "--seeds":
                if not value.isdecimal() or int(value) < 1:
                    raise UserError(f"--seeds must be an integer of at least 1, got {value!r}")
                request.seeds, seeds_given = int(value), True
            else:
                setattr(request, name.lstrip("-"), Path(value))
        elif name.startswith("-"):
            request.flags += take_flag(token, tokens, NOT_PASSED)
        else:
            request.paths.append(Path(token))
    if request.recipes:
        if request.paths:
            raise UserError(f"--train compares the runs of its recipes alone; leave out {request.paths[0]}")
        request.recipes = list(dict.fromkeys(request.recipes))
        for recipe in request.recipes:
            parse_command_line(["--model", recipe, *request.flags])
    elif request.flags:
        name = request.flags[0].partition("=")[0]
        known = name in FLAGS
        hint = "goes with --train" if known else f"is unknown{did_you_mean(name, ('--train', *own))}"
        raise UserError(f"{name} {hint} (python compare.py --help)")
    elif seeds_given:
        raise UserError("--seeds goes with --train (python compare.py --help)")
    return request


def compare(request: Request) -> int:
    """Train what is missing, show the table, write the report; returns the exit code.

    Raises:
        UserError: If there is nothing to compare, or the configuration of a run to train is not valid.
    """
    failed: list[str] = []
    if request.recipes:
        runs, failed = _train(request)
    else:
        paths = request.paths or [request.log_dir]
        if not request.paths and not request.log_dir.exists():
            raise UserError(f"there are no runs in {request.log_dir}; start with: python train.py --model lenet")
        runs = find_runs(paths)
    finished = [run for run in runs if run.finished]
    if not finished and not failed:
        where = ", ".join(map(str, request.paths or [request.log_dir]))
        raise UserError(f"there is no finished run in {where}; start with: python train.py --model lenet")
    groups = fold(finished)
    if groups:
        print_table(groups)
    if left_out := len(runs) - len(finished):
        print(f"{left_out} unfinished run{'s' if left_out > 1 else ''} left out")
    if older := len(finished) - sum(len(group.runs) for group in groups):
        print(f"{older} older run{'s' if older > 1 else ''} of the same seed left out")
    if request.output and groups:
        write_report(groups, request.output)
        print(f"Wrote {request.output / 'report.md'}")
    for failure in failed:
        print_error("compare.py", failure)
    return 1 if failed else 0


def _train(request: Request) -> tuple[list[Run], list[str]]:
    """Run what is missing; returns the runs asked for, and a line for each that failed."""
    wanted = {recipe: settings(_resolved(recipe, request.flags)) for recipe in request.recipes}
    failed = []
    with training_lock(request.log_dir):
        # Seed by seed, so that all recipes can be compared early on.
        for seed in range(request.seeds):
            for recipe in request.recipes:
                code = train_one(request, recipe, seed, wanted[recipe])
                if code in STOPPED:
                    sys.exit(128 + signal.SIGTERM)
                if code:
                    failed.append(f"{recipe} with seed {seed} was not finished (exit code {code}); see above")
    runs = [run for recipe in request.recipes for run in runs_of(request, recipe, wanted[recipe])]
    return [run for run in runs if run.seed in range(request.seeds)], failed


@contextmanager
def training_lock(log_dir: Path) -> Iterator[None]:
    """Let one process at a time train in a folder of runs.

    Raises:
        UserError: If another one does.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(log_dir / ".compare.lock", timeout=0).acquire()
    except Timeout:
        raise UserError(f"another process is training in {log_dir}; wait for it, or stop it") from None
    with lock:
        yield


def train_one(request: Request, recipe: str, seed: int, wanted: dict[str, Any], seconds: float | None = None) -> int:
    """Make one run, or go on with it; a finished one is not repeated.

    Args:
        request: Folder of the runs, and flags of train.py.
        recipe: Name of the recipe.
        seed: Its seed.
        wanted: The settings by which its runs are known.
        seconds: Stop it after so long; it leaves a checkpoint.

    Returns:
        The exit code of train.py; one of `STOPPED` if the training was told to stop.
    """
    mine = [run for run in runs_of(request, recipe, wanted) if run.seed == seed]
    if done := [run for run in mine if run.finished]:
        print(f"{recipe}, seed {seed}: finished ({done[-1].folder})", flush=True)
        return 0
    command = ["--model", recipe, "--seed", str(seed), "--log_dir", str(request.log_dir), *request.flags]
    stopped = [path for run in mine if (path := run.folder / "checkpoints" / "last.ckpt").exists()]
    if stopped:
        command += ["--ckpt_path", str(max(stopped, key=lambda path: path.stat().st_mtime))]
    print(f"{recipe}, seed {seed}: {'going on' if stopped else 'starting'}", flush=True)
    process = subprocess.Popen([sys.executable, str(PROJECT / "train.py"), *command])
    # A scheduler that stops this process means the training: pass it on, and wait for its checkpoint.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        return process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to the training too
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def runs_of(request: Request, recipe: str, wanted: dict[str, Any]) -> list[Run]:
    """The runs of a recipe that compute what the settings say, finished or not."""
    folder = request.log_dir / parse_command_line(["--model", recipe]).recipe  # type: ignore[union-attr,operator]
    return [run for run in (find_runs([folder]) if folder.exists() else []) if matches(run, wanted)]


def _resolved(recipe: str, flags: list[str]) -> dict[str, Any]:
    """The configuration of one of several recipes: a mistake is said to be that recipe's."""
    try:
        return resolved(recipe, flags)
    except UserError as error:
        raise UserError(f"{recipe}: {error}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
