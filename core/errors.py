"""Typed errors: each becomes one line on stderr, one exit status and one `error` entry in result.json."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_SUCCESS = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DIVERGED = 3
EXIT_NOT_CONVERGED = 4
EXIT_STOPPED = 75
"""Stopped by a signal and resumable (EX_TEMPFAIL of sysexits.h: try again later)."""


class TimetrialError(Exception):
    """A failure that a user can act on. `message` is one line: what is wrong, what was expected, what to do."""

    kind = "failed"
    status = "failed"
    exit_code = EXIT_FAILED

    def __init__(self, message: str, *, rank: int | None = None, step: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.rank = rank
        self.step = step

    @property
    def message(self) -> str:
        return str(self)


class UsageError(TimetrialError):
    """A mistake on the command line or in the configuration, or a requirement this machine does not meet."""

    kind = "usage"
    exit_code = EXIT_USAGE


class PluginError(UsageError):
    """A plugin that cannot be discovered, loaded or composed."""

    kind = "plugin"


class DataError(TimetrialError):
    """Missing, corrupt or too little data; names the file and how to prepare it."""

    kind = "data"


class CheckpointError(TimetrialError):
    """A checkpoint that cannot be written, verified or applied."""

    kind = "checkpoint"


class DivergedError(TimetrialError):
    """A loss, gradient or parameter that is not finite."""

    kind = "diverged"
    status = "diverged"
    exit_code = EXIT_DIVERGED


class OutOfMemoryError(TimetrialError):
    """Device memory ran out; the message carries the peak and the batch size."""

    kind = "out_of_memory"


def nearest(name: str, options: Iterable[str]) -> str:
    """Text for an error about an unknown `name`: the nearest valid option, or all of them.

    >>> nearest("renset", ["resnet", "bert"])
    "did you mean 'resnet'?"
    """
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"expected one of: {', '.join(options)}" if options else "there are none"
