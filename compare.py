"""Finished runs side by side: a table, and on request Markdown, CSV and plots; can train what is missing first.

Only light modules are imported here; training happens in processes of its own, each a plain `train.py`.
"""

import sys
from pathlib import Path

from errors import UserError, importing, run_program

with importing("compare.py"):
    from cli.command import parse_command_line
    from cli.flags import FLAGS
    from cli.recipes import did_you_mean
    from runs.flags import Parser, at_least_one, path
    from runs.report import compare
    from runs.training import INTERRUPTED, Request

NOT_PASSED = {
    "--model": "name the recipes behind --train",
    "--seed": "give their number with --seeds",
    "--seed_everything": "give their number with --seeds",
    "--ckpt_path": "unfinished runs go on by themselves",
    "--print_config": "use train.py",
    "--print_model": "use train.py",
}


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        "compare.py",
        "Shows finished runs side by side, with runs that differ only in their seed as one line, and says\n"
        "which differences are more than chance.",
        NOT_PASSED,
    )
    parser.usage = (
        "python compare.py [RUNS...] [--log_dir DIR] [--output [DIR]]\n"
        "       python compare.py --train RECIPE... [--seeds N] [--output [DIR]] [flags of train.py]"
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=path,
        metavar="RUNS",
        help="runs, or folders of runs (default: all of --log_dir)",
    )
    parser.add_argument("--log_dir", type=path, metavar="DIR", help="folder of the runs (default: logs)")
    parser.add_argument(
        "--output",
        type=path,
        nargs="?",
        const=Path("outputs", "comparison"),
        metavar="DIR",
        help="also write report.md, runs.csv and plots (PNG), into this folder or outputs/comparison",
    )
    parser.add_argument(
        "--train",
        nargs="*",
        action="extend",
        metavar="RECIPE",
        help="first train what is missing, one run after another, and compare only these runs; stopped runs "
        "continue where they were, and finished ones are not repeated",
    )
    parser.add_argument(
        "--seeds", type=at_least_one, metavar="N", help="with --train: the seeds 0 to N-1 of each recipe (default: 1)"
    )
    return parser


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    return run_program("compare.py", lambda: _run(arguments), INTERRUPTED)


def _run(arguments: list[str]) -> int:
    request = parse(arguments)
    if request is None:
        parser().print_help()
        return 0
    return compare(request)


def parse(arguments: list[str]) -> Request | None:
    """Check the arguments; None if help was asked for.

    Raises:
        UserError: For any mistake that can be seen without importing torch.
    """
    own = parser()
    options, flags = own.split(arguments)
    if options is None:
        return None
    recipes = list(dict.fromkeys(options.train or []))
    if options.train is not None and not all([recipes, *recipes]):
        raise UserError("--train needs the names of recipes: --train lenet alexnet")
    if recipes and options.paths:
        raise UserError(f"--train compares only the runs of its recipes; leave out {options.paths[0]}")
    if flags and not recipes:
        name = flags[0].partition("=")[0]
        hint = "goes with --train" if name in FLAGS else f"is unknown{did_you_mean(name, own.own)}"
        raise UserError(f"{name} {hint} (python compare.py --help)")
    if options.seeds and not recipes:
        raise UserError("--seeds goes with --train (python compare.py --help)")
    for recipe in recipes:
        command = parse_command_line(["--model", recipe, *flags])
        if command and (command.find_lr or command.find_batch_size):
            raise UserError("--train knows runs by their settings: give --lr and --batch_size as numbers, not auto")
    defaults = Request()
    log_dir, seeds = options.log_dir or defaults.log_dir, options.seeds or defaults.seeds
    return Request(options.paths, log_dir, options.output, recipes, seeds, flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
