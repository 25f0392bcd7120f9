"""The errors that a command prints without a traceback."""
from __future__ import annotations

import errno
import os
import re

# Escape sequences of terminals, and all control characters but the end of a line and the tab.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Of services that models and code come from, and of what calls itself a secret.
_TOKEN = re.compile(
    r"\b(?:hf_|api_org_)[A-Za-z0-9]{12,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|"
    r"\bglpat-[\w-]{16,}|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b"
                    r"|(?<=://)[^\s/@]+:[^\s/@]+(?=@)|(?<=Bearer "
                    r")[\w.~+/=-]{8,}|(?i:(?<=token=)|(?<=secret=)|(?<=password=)|(?<=api_key=))[^\s'\"&,;]{6,}")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
HIDDEN = "[hidden]"
_MARKUP = re.compile(r"([\\`*\[\]<>#|~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_NO_MEMORY = re.compile("can't allocate memory|out of memory|not enough memory|Unable to allocate|Invalid buffer size")
_KINDS = {
    errno.EACCES: "no permission for {}: name a folder that may be written, or give the permission",
    errno.EPERM: "no permission for {}: name a folder that may be written, or give the permission",
    errno.EROFS: "{} lies on a disk that can only be read: name a folder that may be written",
    errno.ENAMETOOLONG: "the name {} is too long for this file system: name a shorter one",
    errno.EMFILE: "too many files are open ({}): raise the limit with `ulimit -n`",
    errno.EEXIST: "{} is in the way: a folder was to be written where a file is, or the other way round. Choose "
    "another --out",
    errno.ENOTDIR: "{} is in the way: a folder was to be written where a file is, or the other way round. Choose "
    "another --out",
    errno.EISDIR: "{} is in the way: a folder was to be written where a file is, or the other way round. Choose "
    "another --out",
    errno.EDQUOT: "the quota of the disk is used up ({}); what was saved before is whole. Free some space; a training "
    "goes on with --resume",
    errno.ENOSPC: "the disk is full ({}); what was saved before is whole. Free some space; a training goes on "
    "with --resume",
}


class RequestError(ValueError):
    """What was asked for cannot be done. The message says what was wrong, what was found and what would be right.

    Commands print it without a traceback and exit with status 2.
    """


class Stopped(RuntimeError):
    """Training had to stop: Ctrl-C, a full disk, a loss that is not finite, a GPU that is too small. The message says
    where, why, what is kept and how to go on. Commands print it without a traceback and exit with status 1.

    not_finite: the part of the message that says what was NaN or infinite, and in which module it arose; None of
    another end.
    """

    def __init__(self, message: str, not_finite: str | None = None) -> None:
        super().__init__(message)
        self.not_finite = not_finite


def first_lines(error: Exception) -> str:
    """The first two lines of a library's message, which may be long; its class where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] or type(error).__name__


def of_the_system(error: Exception) -> str | None:
    """What to tell of an error that the operating system raised: a file that cannot be read or written, memory that is
    not there; None of any other."""
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):
        return (f"there is not enough memory: {first_lines(error)}. A smaller batch, fewer samples or a smaller "
                "resolution takes less; `stepdistill plan RECIPE` says what a training takes")
    if not isinstance(error, OSError):
        return None
    name = error.filename or "while writing"
    return _KINDS[error.errno].format(f"'{name}'") if error.errno in _KINDS else first_lines(error)


def printable(text: str) -> str:
    """With what a terminal would obey, such as escape sequences in the name of a file, spelled out, and without
    tokens."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], redacted(text))


def unmarked(text: str) -> str:
    """A name in Markdown as it is written, in one line: no markup of Markdown or HTML is made of it."""
    return _MARKUP.sub(r"\\\1", " ".join(printable(text).split()))


def redacted(text: str) -> str:
    """Without what looks like a token, and without what the environment keeps under a name of secrets, such as
    HF_TOKEN."""
    for name, value in os.environ.items():
        if len(value) >= 8 and value in text and _SECRET.search(name):
            text = text.replace(value, HIDDEN)
    return _TOKEN.sub(HIDDEN, text)
