"""Typed errors: each becomes one line on stderr, one exit status and one `error` entry in result.json."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

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
        self.message, self.rank, self.step = " ".join(message.split()), rank, step
        super().__init__(self.message)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a file: kind, status, message, exit_code, and rank and step where known."""
        names = ("kind", "status", "message", "exit_code", "rank", "step")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


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

    kind = status = "diverged"
    exit_code = EXIT_DIVERGED


class OutOfMemoryError(TimetrialError):
    """Device memory ran out; the message carries the peak."""

    kind = "out_of_memory"


class StoppedError(TimetrialError):
    """A signal came before training had begun."""

    kind = status = "stopped"
    exit_code = EXIT_STOPPED


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
