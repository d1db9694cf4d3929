"""What this rank holds of a model and of its optimizer's state, and the whole of both.

A model may be split over the dimension "tensor" of a mesh (`timetrial_sharding.tensor`), over "shard"
(`timetrial_sharding.fsdp`), or first over the one and then over the other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.utils import _pytree as pytree

from timetrial_sharding.fsdp import shards

# A norm over both dimensions is two sums of a scalar: torch would merge them on a mesh that slices its own way, and
# warns on each rank that they might differ between ranks. They do not: the ranks of the second sum agree on the first.
logging.getLogger("torch.distributed.tensor._redistribute").addFilter(
    lambda record: not str(record.msg).startswith("While redistributing")
)


class SplitLayout:
    """A `core.api.types.Layout`. Made once the model is split, and the optimizer made, and before either runs.

    `mesh` is the whole one, with all its named dimensions. `splits` is what `tensor.parallelize` returned; None where
    the model is sharded only.

    Where there are `splits`, some of the model's parameters are parts and others whole, and an optimizer could not tell
    which. It is then given DTensors in their place that share their memory, so that its norms over a parameter, or over
    all of them, are those of the whole. Gradients are still found at the model's parameters, and `optimizer.zero_grad`
    clears them there.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        mesh: DeviceMesh,
        splits: Mapping[str, int] | None = None,
    ) -> None:
        assert not optimizer.state, "the optimizer has stepped already"
        self.model, self.optimizer, self._splits = model, optimizer, dict(splits or {})
        self._mesh = _tensor_first(mesh) if self._splits else None
        self._reshard()
        named = dict(model.named_parameters())
        # FSDP2 exchanges a module's parameters while they are gathered: these objects are the ones that last.
        self._parameters = {parameter: name for name, parameter in named.items()}
        if self._splits:
            self._optimize_views()

    def parameters(self) -> Iterator[Tensor]:
        """Each parameter as a DTensor where the layout splits anything, sharing this rank's memory."""
        for parameter, name in self._parameters.items():
            yield self._view(name, parameter.detach())

    def local_parameters(self) -> Iterator[Tensor]:
        """What this rank holds of each, as plain tensors that share its memory. Nothing is communicated."""
        for parameter in self._parameters:
            held = parameter.detach()
            yield held.to_local() if isinstance(held, DTensor) else held

    def model_state(self) -> dict[str, Any]:
        """The model's state dict with whole tensors, named as without a layout; a tied parameter under each name."""
        self._reshard()
        return {name: self._whole(name, value) for name, value in self.model.state_dict().items()}

    def load_model_state(self, state: Mapping[str, Any]) -> None:
        """Loads what `model_state` gives, from this layout, another one or none."""
        self._reshard()
        mine = self.model.state_dict()
        self.model.load_state_dict({name: self._part(name, value, mine.get(name)) for name, value in state.items()})

    def _optimize_views(self) -> None:
        optimizer = self.optimizer
        views = {p: nn.Parameter(self._view(name, p.detach()), p.requires_grad) for p, name in self._parameters.items()}
        for group in optimizer.param_groups:
            group["params"] = [views[parameter] for parameter in group["params"]]

        def give_gradients(*_: Any) -> None:
            for parameter, view in views.items():
                grad = parameter.grad
                view.grad = None if grad is None else self._view(self._parameters[parameter], grad)

        def zero_grad(set_to_none: bool = True) -> None:
            for parameter, view in views.items():
                view.grad = None
                if parameter.grad is not None and not set_to_none:
                    parameter.grad.zero_()
                else:
                    parameter.grad = None

        optimizer.register_step_pre_hook(give_gradients)
        optimizer.zero_grad = zero_grad

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state dict with whole tensors, as that of one rank."""
        return pytree.tree_map_only(DTensor, DTensor.full_tensor, self.optimizer.state_dict())

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Loads what `optimizer_state` gives, from this layout, another one or none."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        numbered = state["state"].items()
        cut = {n: {key: _cut(value, parameters[n]) for key, value in own.items()} for n, own in numbered}
        self.optimizer.load_state_dict({**state, "state": cut})

    def _reshard(self) -> None:
        for shard in shards(self.model):
            shard.reshard()

    def _view(self, name: str, held: Tensor) -> Tensor:
        """What this rank holds of the parameter `name`, or of a tensor like it, as a part of the whole."""
        if self._mesh is None:
            return held
        local, shape = held.to_local() if isinstance(held, DTensor) else held, list(held.shape)
        placements: list[Placement] = [Shard(0) if isinstance(held, DTensor) else Replicate()] * self._mesh.ndim
        placements[0] = Replicate()
        if name in self._splits:
            dim = self._splits[name]
            placements[0], shape[dim] = Shard(dim), shape[dim] * self._mesh.size(0)
        stride = torch.empty(shape, device="meta").stride()
        size = torch.Size(shape)
        return DTensor.from_local(local, self._mesh, placements, run_check=False, shape=size, stride=stride)

    def _whole(self, name: str, held: Any) -> Any:
        seen = self._view(name, held) if name in self._splits else held
        return seen.full_tensor() if isinstance(seen, DTensor) else seen

    def _part(self, name: str, whole: Any, like: Any) -> Any:
        """What this rank holds of `whole`, as it holds `like`."""
        if name not in self._splits:
            return _cut(whole, like)
        part = _cut(whole, self._view(name, like))
        if not isinstance(part, DTensor):
            return part  # of another shape: load_state_dict says so
        if not isinstance(like, DTensor):
            return part.to_local()
        return DTensor.from_local(
            part.to_local(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def _tensor_first(mesh: DeviceMesh) -> DeviceMesh:
    """The dimension "tensor" of `mesh`, and with it "shard" where there is one, in the order in which a parameter is
    split: then plain `Shard` placements describe it. DeviceMesh itself slices only in its own order."""
    assert mesh.mesh_dim_names is not None
    if "shard" not in mesh.mesh_dim_names:
        return mesh["tensor"]
    names = tuple(name for name in mesh.mesh_dim_names if name in ("tensor", "shard"))
    ranks = mesh[names].mesh if names == ("tensor", "shard") else mesh[names].mesh.T
    groups = [mesh.get_group("tensor"), mesh.get_group("shard")]
    return DeviceMesh.from_group(groups, mesh.device_type, ranks.tolist(), mesh_dim_names=("tensor", "shard"))


def _cut(whole: Any, like: Any) -> Any:
    """This rank's part of `whole`, where it is a tensor of the shape of the split `like`; else `whole` itself."""
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
        total.unsharded += not isinstance(tensor, DTensor) or all(p.is_replicate() for p in tensor.placements)
    return total
