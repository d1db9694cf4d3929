"""Stands in for CUDA's recording on a CPU, so that all but the thin CUDA part can be tested without a GPU.

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
from torch.utils import _pytree as pytree


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
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        torch.set_rng_state(generator)

        def replay() -> None:
            again = [t for t in pytree.tree_leaves(function()) if isinstance(t, Tensor)]
            with torch.no_grad():
                for output, value in zip(outputs, again, strict=True):
                    output.copy_(value)

        return replay, result


def main() -> int:
    import timetrial_cuda_graphs.cuda as cuda
    from core.run import main as run
    from timetrial_cuda_graphs.plugin import CudaGraphs

    CudaGraphs.spec = dataclasses.replace(CudaGraphs.spec, requires=frozenset())
    cuda.CudaCapture = Tape
    cuda.leave_the_default_stream = lambda device: None
    gc.freeze = lambda: None  # the tape finds tensors through the collector
    return run()


if __name__ == "__main__":
    sys.exit(main())
