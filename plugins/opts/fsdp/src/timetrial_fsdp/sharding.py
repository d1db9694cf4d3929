"""A model whose parameters are sharded over the ranks, block by block, and how much of it each rank holds."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


class ShardedModel:
    """`model`, sharded in place: one group of parameters for each of `blocks`, and one for all others.

    Each rank holds one part of each parameter, cut along dimension 0. A group is gathered for its forward and its
    backward pass, in which its gradients are averaged and cut again. Parameter names stay.
    """

    def __init__(
        self, model: nn.Module, blocks: list[nn.Module], device: torch.device, world_size: int, reshard: bool
    ) -> None:
        self.model, self.reshard = model, reshard
        # Named, for by default it would take a GPU wherever there is one, whatever device the backend chose.
        mesh = init_device_mesh(device.type, (world_size,))
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        # Its backward pass begins where its forward pass ends: freeing parameters in between would gain nothing.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)

    @property
    def _shards(self) -> list[FSDPModule]:
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    @property
    def groups(self) -> int:
        return len(self._shards)

    @contextmanager
    def whole(self) -> Generator[None]:
        """Every rank holds every parameter: forward passes communicate nothing. All ranks enter together."""
        self.model.set_reshard_after_forward(False)
        for shard in self._shards:
            shard.unshard()
        try:
            yield
        finally:
            for shard in self._shards:
                shard.reshard()
                if shard is not self.model:
                    shard.set_reshard_after_forward(self.reshard, recurse=False)


@dataclass
class Held:
    """Bytes of some tensors, over all ranks and on this one."""

    whole: int = 0
    local: int = 0
    unsharded: int = 0
    """Tensors that each rank holds whole."""


def held(tensors: Iterable[Any]) -> Held:
    """What this rank holds of `tensors`; scalars, such as a step count, and other data are left out."""
    total = Held()
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            continue
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        total.whole += tensor.numel() * tensor.element_size()
        total.local += local.nbytes
        total.unsharded += not isinstance(tensor, DTensor)
    return total
