"""One step's forward and backward passes over micro-batches, with the gradient of the whole batch."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from core.api.errors import NotOfferedError
from core.api.tree import map_tensors, tensors
from core.api.types import Batch, Outputs, Step


def split(batch: Batch, steps: int, data_size: int) -> list[Batch]:
    """`batch` as at most `steps` micro-batches along dimension 0, whose weights sum to the batch's own.

    Their sizes differ by at most one example. Their number is the same on all ranks where the shares of a batch differ
    by at most one example (`core.api.data`), as collectives inside the model need. Scalars and other data go to every
    micro-batch. NotOfferedError where tensors have first dimensions of different sizes.
    """
    sizes = {len(tensor) for tensor in tensors(batch.data) if tensor.dim()}
    if len(sizes) != 1:
        raise NotOfferedError(
            "opt 'grad_accumulation' cannot split this workload's batches: their tensors have first dimensions of "
            f"{', '.join(map(str, sorted(sizes))) or 'no'} elements, not one for each example; leave it out"
        )
    size = sizes.pop()
    number = max(1, min(steps, size, batch.samples // data_size))
    lengths = [size // number + (i < size % number) for i in range(number)]
    return [
        Batch(
            data=_rows(batch.data, start, end),
            samples=end * batch.samples // size - start * batch.samples // size,
            weight=batch.weight * (end - start) / size,
        )
        for start, end in pairwise(accumulate(lengths, initial=0))
    ]


def _rows(data: Any, start: int, end: int) -> Any:
    def cut(tensor: Tensor) -> Tensor:
        return tensor[start:end] if tensor.dim() else tensor

    return map_tensors(cut, data)


def combine(parts: list[Outputs], shares: list[float]) -> Outputs:
    """The outputs of a whole batch. `shares` are the parts of the batch's examples, with sum 1.

    "loss" is weighted already, and summed. Other scalars: means are averaged by share where they are floating point,
    counts are summed where they are integers. Tensors with dimensions hold an entry per example, and are joined.
    """
    outputs: Outputs = {}
    for name in parts[0]:
        values = [part[name].detach() for part in parts]
        if name == "loss":
            outputs[name] = torch.stack(values).sum(0)
        elif values[0].dim():
            outputs[name] = torch.cat(values)
        elif values[0].is_floating_point():
            outputs[name] = torch.stack([v * share for v, share in zip(values, shares, strict=True)]).sum(0)
        else:
            outputs[name] = torch.stack(values).sum(0)
    return outputs


class Accumulation:
    """Calls `inner` once for each micro-batch; ranks exchange gradients in the last call only."""

    def __init__(self, inner: Step, model: nn.Module, steps: int, data_size: int) -> None:
        self.inner, self.steps, self.data_size = inner, steps, data_size
        # DistributedDataParallel, wherever an opt has wrapped it; one rank's model exchanges nothing.
        self._local: Any = next((m.no_sync for m in model.modules() if hasattr(m, "no_sync")), nullcontext)
        self.exchanges = self._local is not nullcontext
        self.seen: Counter[int] = Counter()
        """Steps by their number of micro-batches."""

    def __call__(self, batch: Batch) -> Outputs:
        micro_batches = split(batch, self.steps, self.data_size)
        self.seen[len(micro_batches)] += 1
        outputs: list[Outputs] = []
        for number, micro_batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            context: AbstractContextManager[Any] = nullcontext() if last else self._local()
            with context:
                outputs.append(self.inner(micro_batch))
        return combine(outputs, [m.weight / batch.weight for m in micro_batches])
