"""What a user can get wrong: one line that names the value, the limit and the remedy."""


class UserError(ValueError):
    """A mistake that the user can mend. Commands print its message and exit with its code, without a traceback."""

    exit_code = 2


class SourceError(UserError):
    """RAW holds nothing that we know, contradicts itself, or is not what it was."""
