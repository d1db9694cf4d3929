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
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree


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

    def give_whole_states(self, bare: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """From here on the state dicts of the optimizer and of the `bare` model hold whole tensors, as without
        sharding, and such are loaded. All ranks ask for them together."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def gather_model(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
            state.update({name: tensor.full_tensor() for name, tensor in state.items() if isinstance(tensor, DTensor)})

        def cut_model(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            for shard in self._shards:
                shard.reshard()
            # A parameter that two modules share, as BERT's embedding and decoder do, has two names.
            for name, own in model.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
                if name in state:
                    state[name] = _cut(state[name], own)

        def gather_optimizer(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            return pytree.tree_map_only(DTensor, DTensor.full_tensor, state)

        def cut_optimizer(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            numbered = state["state"].items()
            cut = {n: {key: _cut(value, parameters[n]) for key, value in own.items()} for n, own in numbered}
            return {**state, "state": cut}

        bare.register_state_dict_post_hook(gather_model)
        bare.register_load_state_dict_pre_hook(cut_model)
        optimizer.register_state_dict_post_hook(gather_optimizer)
        optimizer.register_load_state_dict_pre_hook(cut_optimizer)

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


def _cut(whole: Any, like: Tensor) -> Any:
    """This rank's part of `whole`, where it is a tensor of the shape of the sharded `like`; else `whole` itself."""
    if not isinstance(whole, Tensor) or not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


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
