"""The command: reads the recipe's name and the short flags, then hands over to LightningCLI.

Only light modules are imported here, so that `--help` and plain mistakes answer at once.
"""

import sys

from errors import ended_by_ctrl_c, run_program


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code (see errors.py)."""
    return run_program("train.py", lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    from cli.command import parse_command_line  # here, where a missing package is one line
    from cli.flags import help_text

    command = parse_command_line(arguments)
    if command is None:
        print(help_text(predict="predict" in arguments))
        return 0
    with ended_by_ctrl_c():
        from launch.run import run  # torch and Lightning take seconds to import

    return run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
