"""One step's forward and backward passes over micro-batches, with the gradient of the whole batch."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from core.api.errors import UsageError
from core.api.types import Batch, Outputs, Step


def split(batch: Batch, steps: int, world_size: int) -> list[Batch]:
    """`batch` as at most `steps` micro-batches along dimension 0, whose weights sum to the batch's own.

    Their sizes differ by at most one example. Their number is the same on all ranks where the ranks' shares of a batch
    differ by at most one example (`core.api.data`), as collectives inside the model need. UsageError if a tensor of two
    or more shares no first dimension with the others; scalars and other data go to every micro-batch.
    """
    leaves, structure = pytree.tree_flatten(batch.data)
    splittable = [isinstance(leaf, Tensor) and leaf.dim() > 0 for leaf in leaves]
    sizes = {leaf.shape[0] for leaf, split_it in zip(leaves, splittable, strict=True) if split_it}
    if len(sizes) != 1:
        raise UsageError(
            "opt 'grad_accumulation' cannot split this workload's batches: their tensors have first dimensions of "
            f"{', '.join(map(str, sorted(sizes))) or 'no'} elements, not one for each example; leave it out"
        )
    size = sizes.pop()
    number = max(1, min(steps, size, batch.samples // world_size))
    chunks = [
        torch.tensor_split(leaf, number) if split_it else [leaf] * number
        for leaf, split_it in zip(leaves, splittable, strict=True)
    ]
    lengths = [len(part) for part in torch.arange(size).tensor_split(number)]
    ends = [sum(lengths[: i + 1]) * batch.samples // size for i in range(number)]
    return [
        Batch(
            data=pytree.tree_unflatten([chunk[i] for chunk in chunks], structure),
            samples=end - start,
            weight=batch.weight * length / size,
        )
        for i, (length, start, end) in enumerate(zip(lengths, [0, *ends], ends, strict=False))
    ]


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

    def __init__(self, inner: Step, model: nn.Module, steps: int, world_size: int) -> None:
        self.inner, self.steps, self.world_size = inner, steps, world_size
        # DistributedDataParallel, wherever an opt has wrapped it; one rank's model exchanges nothing.
        self._local: Any = next((m.no_sync for m in model.modules() if hasattr(m, "no_sync")), nullcontext)
        self.exchanges = self._local is not nullcontext
        self.seen: Counter[int] = Counter()
        """Steps by their number of micro-batches."""

    def __call__(self, batch: Batch) -> Outputs:
        micro_batches = split(batch, self.steps, self.world_size)
        self.seen[len(micro_batches)] += 1
        outputs: list[Outputs] = []
        for number, micro_batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            context: AbstractContextManager[Any] = nullcontext() if last else self._local()
            with context:
                outputs.append(self.inner(micro_batch))
        return combine(outputs, [m.weight / batch.weight for m in micro_batches])
