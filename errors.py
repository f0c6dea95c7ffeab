"""The one exception whose message is shown to the user as it stands."""


class UserError(Exception):
    """A mistake that the user can mend; its message is one line: what was wrong, what was expected, what to do."""
