"""The one exception for a user's mistakes."""


class UserError(ValueError):
    """A mistake in a command, a config or a file: one line that says what is wrong and what to do.

    Entry points print it without a traceback and end with exit code 1.
    """
