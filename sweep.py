"""A search for the best settings of a recipe by validation accuracy, with Optuna; its result is a recipe.

Only light modules are imported here; training happens in processes of its own, each a plain `train.py fit`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from cli.command import parse_command_line
from cli.flags import take_flag, take_values
from cli.recipes import did_you_mean
from errors import UserError, run_program
from runs.search_space import Space, add_setting

HELP = """\
usage: python sweep.py RECIPE --space KEY=VALUES... [--trials N] [--output FILE] [flags of train.py]

Trains a recipe again and again with other settings, chosen by Optuna, and writes the best as a recipe of its own.
Best is the highest validation accuracy; the test images are not touched. Stopped at any time, the same command goes
on where it was.

  --space KEY=VALUES...  what to search:
                           lr=log:1e-4..1e-2             a range, evenly in its logarithm
                           data.crop_padding=0..4        a range; whole numbers where the setting takes those
                           batch_size=64,128,256         a choice
                         KEY is a short flag of train.py or any setting: model.optimizer.weight_decay=0..0.1
  --trials N             how many settings to try in all (default: 20); a larger number continues a finished sweep
  --pruner NAME          when to give up a trial early: median (default: it is worse than the median of the others at
                         the same epoch), hyperband or none
  --output FILE          the recipe to write, such as configs/mine.yaml (default: RECIPE_best.yaml beside the trials)
  --log_dir DIR          folder of the runs (default: logs); the trials lie in its folder sweeps/

All other flags, such as --max_epochs, --accelerator or --data_dir, go to each `python train.py fit --model RECIPE`."""
PRUNERS = ("median", "hyperband", "none")
OWN = ("--space", "--trials", "--pruner", "--output", "--log_dir")
NOT_PASSED = {
    "--model": "name the recipe itself: python sweep.py lenet --space ...",
    "--ckpt_path": "unfinished trials go on by themselves",
    "--print_config": "use train.py",
    "--print_model": "use train.py",
    **dict.fromkeys(("--images", "--invert", "--gradcam"), "it belongs to train.py predict"),
}


@dataclass
class Request:
    """A checked command line.

    Attributes:
        recipe: Name or path of the recipe.
        space: Dotted name of each setting, without `init_args`, and what to try for it.
        spelled: The same as it was given.
        trials: How many settings to try in all.
        pruner: One of `PRUNERS`.
        output: The recipe to write, or None for one beside the trials.
        log_dir: Folder of the runs.
        flags: Flags of train.py.
    """

    recipe: str = ""
    space: Space = field(default_factory=dict)
    spelled: list[str] = field(default_factory=list)
    trials: int = 20
    pruner: str = "median"
    output: Path | None = None
    log_dir: Path = Path("logs")
    flags: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    return run_program("sweep.py", lambda: _run(arguments), "Stopped by Ctrl-C. The same command continues from here.")


def _run(arguments: list[str]) -> int:
    request = parse(arguments)
    if request is None:
        print(HELP)
        return 0
    from runs.sweeps import sweep  # here, not above: Optuna takes a second to import

    return sweep(request)


def parse(arguments: list[str]) -> Request | None:
    """Check the arguments; None if help was asked for.

    Raises:
        UserError: For any mistake that can be seen without importing torch or Optuna.
    """
    request, tokens = Request(), list(arguments)
    while tokens:
        token = tokens.pop(0)
        name, has_value, value = token.partition("=")
        if name in ("-h", "--help"):
            return None
        if name == "--space":
            for setting in [*([value] if has_value else []), *take_values(tokens)]:
                add_setting(request.space, setting)
                request.spelled.append(setting)
        elif name in OWN:
            if not has_value:
                value = tokens.pop(0) if tokens and not tokens[0].startswith("--") else ""
            if not value:
                raise UserError(f"{name} needs a value (python sweep.py --help)")
            _set(request, name, value)
        elif name.startswith("-"):
            request.flags += take_flag(token, tokens, NOT_PASSED)
        elif request.recipe:
            raise UserError(f"two recipes, {request.recipe} and {token}; a sweep takes one")
        else:
            request.recipe = token
    if not request.recipe:
        raise UserError("name a recipe: python sweep.py lenet --space lr=log:1e-4..1e-2 (python sweep.py --help)")
    try:
        command = parse_command_line(["fit", "--model", request.recipe, *request.flags])
    except UserError as error:
        unknown = next((flag for flag in request.flags if str(error).startswith(f"unknown flag {flag}")), "")
        raise UserError(f"{error}{did_you_mean(unknown, OWN)}" if unknown else str(error)) from None
    assert command is not None
    if not request.space:
        raise UserError("nothing to search: give --space KEY=VALUES..., such as --space lr=log:1e-4..1e-2")
    for flag in command.overrides:
        name = flag.lstrip("-").partition("=")[0].replace(".init_args", "")
        if name in request.space:
            raise UserError(f"{name} stands both in --space and as a flag; leave one out")
    return request


def _set(request: Request, name: str, value: str) -> None:
    if name == "--trials":
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"--trials must be an integer of at least 1, got {value!r}")
        request.trials = int(value)
    elif name == "--pruner":
        if value not in PRUNERS:
            raise UserError(f"--pruner must be one of {', '.join(PRUNERS)}, got {value!r}")
        request.pruner = value
    elif name == "--output":
        if not value.endswith((".yaml", ".yml")):
            raise UserError(f"--output must be a file name that ends in .yaml, got {value!r}")
        request.output = Path(value)
    else:
        request.log_dir = Path(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
