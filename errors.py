"""The exceptions whose messages are shown to the user as they stand, and the exit codes of train.py."""


class UserError(Exception):
    """A mistake that the user can mend; its message is one line: what was wrong, what was expected, what to do.

    Line breaks in what the user gave show as \\n.
    """

    exit_code = 2

    def __str__(self) -> str:
        return "\\n".join(super().__str__().splitlines())


class RunError(UserError):
    """A run that can't go on although its command line is right: disk full, out of memory, a process gone."""

    exit_code = 1


class Diverged(UserError):
    """Training that makes no sense to continue; the last good checkpoint is kept."""

    exit_code = 3


class Stopped(Exception):
    """Training that a signal has ended in good order.

    Args:
        message: What was saved and how to go on; empty on processes that leave it to the first one to say so.
        exit_code: 130 after Ctrl-C, else 143, as if the signal had ended the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
