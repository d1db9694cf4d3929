"""Replaces CUDA's recording on a CPU, so that all but the thin CUDA part can be tested without a GPU: `Tape` for
that of a step, `Pool` for that of parts of a model.

python tape.py OVERRIDES        the command line of core.run, with `cuda_graphs` on a tape
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.api.tree import tensors


class Tape:
    """Recording runs a function and takes back what it did to tensors and to the random generator; each replay runs it
    again, into the tensors of the recorded result."""

    def __init__(self) -> None:
        self.recordings = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recordings += 1
        generator = torch.get_rng_state()
        with warnings.catch_warnings():  # looking at all objects touches deprecated ones
            warnings.simplefilter("ignore")
            found = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
        before = [(t, t.detach().clone()) for t in found if t.is_cpu]  # other tests leave tensors without data behind
        result = function()
        outputs = tensors(result)
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        torch.set_rng_state(generator)

        def replay() -> None:
            again = function()
            with torch.no_grad():
                for output, value in zip(outputs, tensors(again), strict=True):
                    output.copy_(value)

        return replay, result


class Pool:
    """Replaces torch.cuda.make_graphed_callables with all graphs in one pool of memory.

    As a graph does, a graphed module takes the shapes that it was recorded with and no others, and overwrites the
    activations of the modules that were recorded by another call. While those are needed, that is an AssertionError.
    """

    def __init__(self) -> None:
        self.recordings: list[tuple[torch.nn.Module, ...]] = []
        self.calls = 0
        self.autocast = False
        self.holder: int | None = None
        """The recording whose activations wait for the backward pass."""
        self.waiting = 0

    def __call__(
        self, modules: tuple[torch.nn.Module, ...], arguments: tuple[tuple[Tensor, ...], ...], pool: Any = None
    ) -> None:
        self.recordings.append(modules)
        self.autocast = torch.is_autocast_enabled("cpu")
        for module, examples in zip(modules, arguments, strict=True):
            module(*examples).sum().backward()  # what warms up disturbs gradients, buffers and the generator
            module.forward = self._graphed(len(self.recordings), module.forward, [e.shape for e in examples])

    def _graphed(self, number: int, forward: Callable[..., Tensor], shapes: list[torch.Size]) -> Callable[..., Tensor]:
        def done(gradient: Tensor) -> None:
            self.waiting -= 1

        def graphed(*args: Tensor) -> Tensor:
            assert [a.shape for a in args] == shapes, "a graph takes one shape"
            assert not self.waiting or self.holder == number, "activations are overwritten that are still needed"
            self.holder, self.calls, self.waiting = number, self.calls + 1, self.waiting + 1
            output = forward(*args)
            output.register_hook(done)
            return output

        return graphed


def main() -> int:
    import timetrial_cuda_graphs.cuda as cuda
    from core.run import main as run
    from timetrial_cuda_graphs.plugin import CudaGraphs

    CudaGraphs.spec = dataclasses.replace(CudaGraphs.spec, requires=frozenset())
    cuda.CudaCapture = Tape
    torch.cuda.make_graphed_callables = Pool()
    torch.cuda.graph_pool_handle = lambda: (0, 1)
    cuda.leave_the_default_stream = lambda device: None
    gc.freeze = lambda: None  # the tape finds tensors through the collector
    return run()


if __name__ == "__main__":
    sys.exit(main())
