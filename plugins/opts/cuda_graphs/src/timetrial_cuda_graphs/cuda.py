"""What touches CUDA: the run's stream, and recording on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from core.api.errors import NotHereError, UsageError


def leave_the_default_stream(device: torch.device) -> None:
    """Makes another stream current for the rest of this process, before anything of the run is built.

    A recording cannot take place on the default stream, and fails where an autograd node that accumulates a gradient
    belongs to another stream than the recorded one (PyTorch, "CUDA semantics", section on DistributedDataParallel).
    NotHereError where the device is not one of CUDA's.
    """
    if device.type != "cuda":
        raise NotHereError(f"opt 'cuda_graphs' needs a CUDA device, but this run is on the {device.type}: leave it out")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)


class CudaCapture:
    """A `Capture` on the current stream. All recordings share one pool of memory: they are replayed one after the
    other, and what they return is copied before the next one runs.

    torch registers its default generator with each recording, so that every replay draws new numbers: those that the
    eager step would have drawn, since both advance the generator's offset alike.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._first: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Raises whatever `function` raises while it is recorded."""
        graph, failure, result = torch.cuda.CUDAGraph(), None, None
        stream = torch.cuda.current_stream()
        try:
            # Other threads keep running: they copy the next batch, or poll NCCL for its progress.
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    result = function()
                except Exception as error:
                    failure = error
                    raise
        except Exception:
            # Ending a recording that has failed raises another error, which hides the cause.
            torch.cuda.set_stream(stream)
            if failure is not None:
                raise failure from None
            raise
        self._first = self._first or graph  # a pool ends with the last of its graphs, and cannot be started again
        return graph.replay, result


def refusing(capture: Callable[[Callable[[], Any]], Any], what: str, hint: str) -> Callable[[Callable[[], Any]], Any]:
    """`capture`, with a failure turned into one line. Running out of memory stays what it is."""

    def attempt(function: Callable[[], Any]) -> Any:
        try:
            return capture(function)
        except (UsageError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"{what} cannot be captured ({type(error).__name__}: {reason}); {hint}") from error

    return attempt
