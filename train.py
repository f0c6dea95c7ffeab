"""The command: reads the recipe's name and the short flags, then hands over to LightningCLI.

Only light modules are imported here, so that `--help` and plain mistakes answer at once.
"""

import sys

from command_line import help_text, parse_command_line
from errors import UserError


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    try:
        command = parse_command_line(arguments)
        if command is None:
            print(help_text())
            return 0
        import cli  # here, not above: torch and Lightning take seconds to import

        cli.run(command)
        return 0
    except UserError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
