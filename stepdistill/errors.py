"""The one error that a user's request can cause."""


class RequestError(ValueError):
    """What was asked for cannot be done. The message says what was wrong, what was found and what would be right.

    Commands print it without a traceback and exit with status 2.
    """
