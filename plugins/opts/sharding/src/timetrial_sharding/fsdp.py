"""A model whose parameters are sharded over ranks, block by block (FSDP2)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


class ShardedModel:
    """`model`, sharded in place: one group of parameters for each of `blocks`, and one for all others.

    Each rank holds one part of each parameter, cut along dimension 0. A group is gathered for its forward and its
    backward pass, in which its gradients are averaged and cut again. Parameter names stay. With `reshard` a block's
    gathered parameters are freed between the two.

    A `mesh` of one dimension shards over it. One of two shards over the second and replicates over the first (hybrid):
    parameters are gathered within a few ranks, and gradients averaged over all. A model that is split by
    `tensor.parallelize` is sharded afterwards, each rank's part over the ranks that hold the same part.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, reshard: bool) -> None:
        self.model, self.reshard = model, reshard
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        # Its backward pass begins where its forward pass ends: freeing parameters in between would gain nothing.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)

    @property
    def groups(self) -> int:
        return len(shards(self.model))

    @contextmanager
    def whole(self) -> Generator[None]:
        """Every rank holds every parameter: forward passes communicate nothing for them. All ranks enter together."""
        for shard in shards(self.model):
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        try:
            yield
        finally:
            for shard in shards(self.model):
                shard.reshard()
                shard.set_reshard_after_forward(self.reshard and shard is not self.model, recurse=False)


def shards(model: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters are a group; none where the model is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
