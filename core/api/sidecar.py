"""A helper process beside a rank, in which the workload and its model are built for inference: an evaluator, a player.

An opt starts one with `ctx.start_sidecar(name, "package.module:serve", device, threads)`. In the new process
`serve(ctx)` is called once, when `ctx` holds everything but what only trains, and returns the function that answers
requests, one after the other. Requests and answers are trees of dicts, lists, tuples, tensors, numbers, strings and
None; tensors arrive on the host.

The process ends with the rank that started it, even if that rank is killed.
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
    """The rank's end. The process starts when this is made, and builds its model while the rank continues."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self._pipe = pipe
        self._built: Reply | None = None
        atexit.register(process.kill)

    def ready(self) -> Reply:
        """Waits until the model is built; `problem` says why it cannot be."""
        if self._built is None:
            self._built = self._receive()
        return self._built

    def ask(self, request: Any) -> None:
        """Sends a request, as soon as the model is built. If the process is gone, `answer` says so."""
        self.ready()
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(packed(request))

    def has_answered(self) -> bool:
        """Whether `answer` would return at once."""
        return self._pipe.poll()

    def answer(self) -> Reply:
        """Waits for the answer to the oldest request."""
        built = self.ready()
        return built if built.problem else self._receive()

    def _receive(self) -> Reply:
        try:
            return Reply(*unpacked(self._pipe.recv_bytes()))
        except (EOFError, OSError):
            return Reply(problem="the process exited unexpectedly (out of memory?)")


def packed(tree: Any) -> memoryview:
    """A request or an answer as bytes."""
    import torch

    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getbuffer()


def unpacked(data: bytes) -> Any:
    """What was `packed`; nothing in it is executed."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
