"""The errors that a command prints without a traceback."""


class RequestError(ValueError):
    """What was asked for cannot be done. The message says what was wrong, what was found and what would be right.

    Commands print it without a traceback and exit with status 2.
    """


class Stopped(RuntimeError):
    """Training had to stop: Ctrl-C, a full disk, a loss that is not finite, a GPU that is too small. The message says
    where, why, what is kept and how to go on. Commands print it without a traceback and exit with status 1.
    """


def first_lines(error: Exception) -> str:
    """The first two lines of a library's message, which may be long; its class where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] or type(error).__name__
