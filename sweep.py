"""A search for the best settings of a recipe by validation accuracy, with Optuna; its result is a recipe.

Only light modules are imported here; training happens in processes of its own, each a plain `train.py fit`.
"""

import sys

from errors import UserError, importing, run_program

with importing("sweep.py"):
    from cli.command import parse_command_line
    from cli.flags import FLAGS
    from cli.recipes import did_you_mean
    from runs.flags import Parser, at_least_one, one_of, path, yaml_file
    from runs.search_space import PRUNERS, SweepRequest, add_setting
    from runs.training import INTERRUPTED

NOT_PASSED = {
    "--model": "name the recipe itself: python sweep.py lenet --space ...",
    "--ckpt_path": "unfinished trials go on by themselves",
    "--print_config": "use train.py",
    "--print_model": "use train.py",
    **dict.fromkeys(("--images", "--invert", "--gradcam"), "it belongs to train.py predict"),
}


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        "sweep.py",
        "Trains a recipe many times with different settings, chosen by Optuna, and writes the best as a recipe.\n"
        "Best is the highest validation accuracy; the test images are not touched. A sweep that was stopped is\n"
        "continued by the same command. The space is\n"
        "  lr=log:1e-4..1e-2         a range, sampled evenly in its logarithm\n"
        "  data.crop_padding=0..4    a range; whole numbers where the setting takes those\n"
        "  batch_size=64,128,256     a choice\n"
        "where the key is a short flag of train.py or any setting: model.optimizer.weight_decay=0..0.1",
        NOT_PASSED,
    )
    parser.usage = (
        "python sweep.py RECIPE --space KEY=VALUES... [--trials N] [--pruner NAME] [--output FILE] [flags of train.py]"
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="recipe whose settings are searched")
    parser.add_argument("--space", nargs="*", action="extend", default=[], metavar="KEY=VALUES", help="what to search")
    trials = "how many settings to try in all (default: 20); a larger number continues a finished sweep"
    parser.add_argument("--trials", type=at_least_one, default=20, metavar="N", help=trials)
    pruner = "when to give up a trial early: median (default; of the others at the same epoch), hyperband or none"
    parser.add_argument("--pruner", type=one_of(*PRUNERS), default="median", metavar="NAME", help=pruner)
    output = "the recipe to write, such as configs/mine.yaml (default: RECIPE_best.yaml beside the trials)"
    parser.add_argument("--output", type=yaml_file, metavar="FILE", help=output)
    log_dir = "folder of the runs (default: logs); the trials lie in its folder sweeps/"
    parser.add_argument("--log_dir", type=path, default="logs", metavar="DIR", help=log_dir)
    return parser


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    return run_program("sweep.py", lambda: _run(arguments), INTERRUPTED)


def _run(arguments: list[str]) -> int:
    request = parse(arguments)
    if request is None:
        parser().print_help()
        return 0
    from runs.sweeps import sweep  # here, not above: Optuna takes a second to import

    return sweep(request)


def parse(arguments: list[str]) -> SweepRequest | None:
    """Check the arguments; None if help was asked for.

    Raises:
        UserError: For any mistake that can be seen without importing torch or Optuna.
    """
    own = parser()
    options, flags = own.split(arguments)
    if options is None:
        return None
    recipe, *others = options.recipes or [""]
    request = SweepRequest(
        recipe, {}, options.space, options.trials, options.pruner, options.output, options.log_dir, flags
    )
    for setting in request.spelled:
        add_setting(request.space, setting)
    if others:
        raise UserError(f"two recipes, {recipe} and {others[0]}; a sweep takes one")
    if not recipe:
        raise UserError("name a recipe: python sweep.py lenet --space lr=log:1e-4..1e-2 (python sweep.py --help)")
    try:
        command = parse_command_line(["fit", "--model", recipe, *flags])
    except UserError as error:
        if not (unknown := next((flag for flag in flags if str(error).startswith(f"unknown flag {flag}")), "")):
            raise
        hint = did_you_mean(unknown, (*own.own, *FLAGS))
        raise UserError(f"unknown flag {unknown}{hint} (python sweep.py --help)") from None
    assert command is not None
    if not request.space:
        raise UserError("nothing to search: give --space KEY=VALUES..., such as --space lr=log:1e-4..1e-2")
    for flag in command.overrides:
        name = flag.lstrip("-").partition("=")[0].replace(".init_args", "")
        if name in request.space:
            raise UserError(f"{name} is given both in --space and as a flag; leave one out")
    return request


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
