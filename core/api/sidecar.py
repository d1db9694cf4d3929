"""A helper process beside a rank, in which the workload and its model are built for inference: an evaluator, a player.

An opt starts one with `ctx.start_sidecar(name, "package.module:serve", device, threads)`. In the new process
`serve(ctx)` is called once, when `ctx` holds everything but what only trains, and returns the function that answers
requests, one after the other. Requests and answers are trees of dicts, lists, tuples, tensors, numbers, strings and
None.

The process ends with the rank that started it, whatever happens to that one.
"""

from __future__ import annotations

import atexit
import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["Reply", "Sidecar"]

Serve = Callable[[Any], Callable[[Any], Any]]
"""`serve(ctx) -> answer`, with `answer(request)`."""


@dataclass(frozen=True)
class Reply:
    """What a sidecar answers: `value` and the `seconds` that it took, or the `problem` that ended it."""

    value: Any = None
    seconds: float = 0.0
    problem: str = ""


class Sidecar:
    """The rank's end. The process starts when this is made, and builds its model while the rank goes on."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self._pipe, self._unready = pipe, True
        atexit.register(process.kill)

    def ready(self) -> Reply:
        """Waits until the model is built; `problem` says why it cannot be."""
        if not self._unready:
            return Reply()
        self._unready = False
        return self._receive()

    def ask(self, request: Any) -> None:
        """Sends a request; returns at once. A process that is gone is noticed by `answer`."""
        import torch

        buffer = io.BytesIO()
        torch.save(request, buffer)
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(buffer.getbuffer())

    def has_answered(self) -> bool:
        """Whether `answer` would return at once."""
        return self._pipe.poll()

    def answer(self) -> Reply:
        """Waits for the answer to the oldest request."""
        return self._receive()

    def _receive(self) -> Reply:
        import torch

        try:
            seconds, problem = self._pipe.recv()
            value = torch.load(io.BytesIO(self._pipe.recv_bytes()), weights_only=True)
        except (EOFError, OSError):
            return Reply(problem="the process exited unexpectedly (out of memory?)")
        return Reply(value, seconds, problem)
