"""Typed errors: each becomes one line on stderr, one exit status and one `error` entry in result.json.

Refusals have kinds, which tests and tools compare (their words may change): `usage`, `plugin`, `conflict`,
`not_offered`, `not_here`.
"""

import difflib
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

__all__ = [
    "EXIT_CODES",
    "CheckpointError",
    "ConflictError",
    "DataError",
    "DivergedError",
    "NotHereError",
    "NotOfferedError",
    "OutOfMemoryError",
    "PluginError",
    "TimetrialError",
    "UsageError",
    "exit_status",
    "nearest",
]

EXIT_CODES = {"success": 0, "throughput": 0, "failed": 1, "diverged": 3, "not_converged": 4, "stopped": 75}
"""Status of a run -> exit status. 75 is EX_TEMPFAIL of sysexits.h: stopped by a signal and resumable."""


class TimetrialError(Exception):
    """A failure that a user can act on. `message` is one line: what is wrong, what was expected, what to do."""

    kind = status = "failed"
    exit_code = EXIT_CODES["failed"]

    def __init_subclass__(cls, kind: str, exit_code: int | None = None) -> None:
        cls.kind, cls.status = kind, kind if kind in EXIT_CODES else "failed"
        cls.exit_code = exit_code or EXIT_CODES[cls.status]

    def __init__(self, message: str, *, rank: int | None = None, step: int | None = None) -> None:
        self.message, self.rank, self.step = " ".join(message.split()), rank, step
        super().__init__(self.message)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a file: kind, status, message, exit_code, and rank and step where known."""
        names = ("kind", "status", "message", "exit_code", "rank", "step")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def show(self, debug: bool = False) -> int:
        """Prints the one line; returns the exit status."""
        if debug:
            traceback.print_exception(self)
        print(f"timetrial: {self}", file=sys.stderr)
        return self.exit_code


class UsageError(TimetrialError, kind="usage", exit_code=2):
    """A mistake on the command line or in the configuration, or a requirement this machine does not meet."""


class PluginError(UsageError, kind="plugin", exit_code=2):
    """A plugin that cannot be discovered, loaded or composed."""


class ConflictError(UsageError, kind="conflict", exit_code=2):
    """Plugins or settings that exclude each other."""


class NotOfferedError(UsageError, kind="not_offered", exit_code=2):
    """This workload lacks what the opt acts on: a seam, a kind of layer or a captured part."""


class NotHereError(UsageError, kind="not_here", exit_code=2):
    """Something that this machine or this number of ranks cannot provide."""


class DataError(TimetrialError, kind="data"):
    """Missing, corrupt or too little data; names the file and how to prepare it."""


class CheckpointError(TimetrialError, kind="checkpoint"):
    """A checkpoint that cannot be written, verified or applied."""


class DivergedError(TimetrialError, kind="diverged"):
    """A loss, gradient or parameter that is not finite."""


class OutOfMemoryError(TimetrialError, kind="out_of_memory"):
    """Device memory ran out; the message carries the peak."""


class StoppedError(TimetrialError, kind="stopped"):
    """A signal came while nothing could be saved."""


def exit_status(command: Callable[[], int], stopped: str = "stopped") -> int:
    """What a command line returns: `command()`, or the exit status of its error; `stopped` is said after Ctrl-C."""
    try:
        return command()
    except TimetrialError as error:
        sys.last_value = error  # as the interpreter does with an error that it prints: for whoever runs this in-process
        return error.show("--debug" in sys.argv)
    except KeyboardInterrupt:
        return StoppedError(stopped).show()


def nearest(name: str, options: Iterable[str]) -> str:
    """Text for an error about an unknown `name`: "did you mean" the nearest valid option, or all of them."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"expected one of: {', '.join(options)}" if options else "there are none"
