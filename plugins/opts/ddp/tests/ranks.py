"""What each rank does in `test_ddp.py`: `python ranks.py SCENARIO`, with RANK and the like in the environment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core.api.mesh import Dimension, Mesh, arrange
from core.api.seams import GRADIENT_BUCKETS, GRADIENT_EXCHANGE, Seam
from timetrial_ddp.plugin import Ddp, DdpConfig

CPU = torch.device("cpu")
TENSOR = Dimension(name="tensor", size=2, splits_data=False, nearness=30)


def untouched(seam: Seam[Any], default: Any) -> Any:
    return default


def wrapped(
    model: nn.Module, offer: Callable[[Seam[Any], Any], Any] = untouched, dimensions: tuple[Dimension, ...] = ()
) -> DistributedDataParallel:
    """`model` as the opt distributes it."""
    mesh = Mesh(arrange(dimensions, dist.get_world_size()), dist.get_rank())
    wrapper = Ddp(DdpConfig(bucket_cap_mib=25.0)).distribute(SimpleNamespace(mesh=mesh, device=CPU, offer=offer))
    next(wrapper)
    try:
        wrapper.send(model)
    except StopIteration as returned:
        return returned.value
    raise AssertionError("the wrapper did not return")


def unequal_shares() -> None:
    """3 and 1 examples, weighted as `core.api.types.Batch` says."""
    torch.manual_seed(dist.get_rank())  # the ranks start apart: DistributedDataParallel takes rank 0's parameters
    model = wrapped(nn.Linear(5, 3))
    x_NF = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    mine = x_NF[:3] if dist.get_rank() == 0 else x_NF[3:]
    (model(mine).square().mean() * len(mine) * dist.get_world_size() / len(x_NF)).backward()
    alone = nn.Linear(5, 3)
    alone.load_state_dict(model.module.state_dict())
    alone(x_NF).square().mean().backward()
    torch.testing.assert_close(model.module.weight.grad, alone.weight.grad, rtol=0, atol=1e-6)


def other_opts() -> None:
    """Others change the size of the buckets, a least size wins, and an exchange of theirs is used."""

    def doubled(state, bucket):  # torch refuses annotations that are strings
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer() * state)
        return future

    def offer(seam: Seam[Any], default: Any) -> Any:
        if seam is GRADIENT_EXCHANGE:
            return 2.0, doubled
        assert seam is GRADIENT_BUCKETS
        return {**default, "bucket_cap_mb": 1.0, "bucket_at_least_mb": 3.0, "gradient_as_bucket_view": True}

    model = wrapped(nn.Linear(5, 3), offer)
    assert model.bucket_bytes_cap == 3 * 2**20
    assert model.gradient_as_bucket_view
    assert not model.broadcast_buffers
    x_NF = torch.ones(1, 5) * (1 + dist.get_rank())
    model(x_NF).sum().backward()
    assert torch.equal(model.module.weight.grad, 2 * x_NF.expand(3, 5))


def data_peers() -> None:
    """Four ranks as data 2 x tensor 2: ranks 0 and 2 hold one part, 1 and 3 the other."""
    rank, part = dist.get_rank(), dist.get_rank() % 2
    model = wrapped(nn.Linear(2 + part, 1, bias=False), dimensions=(TENSOR,))
    model(torch.full((1, 2 + part), float(rank))).sum().backward()
    assert torch.equal(model.module.weight.grad, torch.full((1, 2 + part), part + 1.0))  # the mean of 0, 2 or 1, 3


if __name__ == "__main__":
    dist.init_process_group("gloo")
    {f.__name__: f for f in (unequal_shares, other_opts, data_peers)}[sys.argv[1]]()
    dist.destroy_process_group()
