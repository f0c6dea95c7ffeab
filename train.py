"""The command: reads the recipe's name and the short flags, then hands over to LightningCLI.

Only light modules are imported here, so that `--help` and plain mistakes answer at once.
"""

import sys

from cli.command import help_text, parse_command_line
from errors import Stopped, UserError


def main(arguments: list[str]) -> int:
    """Run one command line.

    Returns:
        The exit code: 0, or 1 if the run failed, 2 for a mistake in the command, 3 if training diverged, 130 after
        Ctrl-C and 143 after another signal that asked to stop.
    """
    try:
        command = parse_command_line(arguments)
        if command is None:
            print(help_text(predict="predict" in arguments))
            return 0
        from launch.run import run  # here, not above: torch and Lightning take seconds to import

        run(command)
        return 0
    except UserError as error:
        if str(error):  # else the first process says it
            print(f"train.py: error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        if str(stopped):
            print(f"\n{stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    if "callbacks.processes" in sys.modules:
        sys.modules["callbacks.processes"].end_process(exit_code)
    sys.exit(exit_code)
