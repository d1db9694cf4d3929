"""Buffers of the model, such as running statistics, that differ from data rank to data rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from core.api.mesh import Mesh
from core.api.types import Evaluate, Forward, Quality, RunContext


def evaluate_alike(ctx: RunContext, evaluate: Evaluate) -> Evaluate:
    """`evaluate`, before which the buffers of all data ranks are averaged: every rank must evaluate the same model."""
    if ctx.data_size == 1 or ctx.sidecar:
        return evaluate
    group = data_group(ctx.mesh)

    def averaged(infer: Forward) -> Quality:
        average_buffers(ctx.model, group)
        return evaluate(infer)

    return averaged


def data_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """The ranks that hold the same part of the model; None is the default group of all ranks. All ranks call it."""
    if len(mesh.data_peers) == mesh.world_size:
        return None
    groups = {Mesh(mesh.dimensions, rank).data_peers for rank in range(mesh.world_size)}
    mine, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in sorted(groups)])
    return mine


@torch.no_grad()
def average_buffers(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Gives all ranks of the group the mean of their floating-point buffers.

    Running statistics are linear in what each batch contributes, so their mean over ranks is the same whether it is
    taken once or after every step. Where ranks hold equal buffers already, these keep their bits.
    """
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    if not buffers:
        return
    mine = torch.cat([b.double().flatten() for b in buffers])
    first = mine.clone()
    dist.broadcast(first, group=group, group_src=0)
    deviation = mine - first  # exactly 0 for equal buffers, which a plain mean of three ranks might round
    dist.all_reduce(deviation, group=group)
    mean = first + deviation / dist.get_world_size(group)
    for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
