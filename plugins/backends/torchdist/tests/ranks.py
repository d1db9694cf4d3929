"""What each rank does in `test_gloo.py`: `python ranks.py SCENARIO`, with RANK and the like in the environment."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

from timetrial_gloo import process_group

CPU = torch.device("cpu")


def agree() -> None:
    """One process group for all three: starting a process costs more than what it checks."""
    group = process_group.join("gloo", CPU, 60.0)
    exchange(group)
    gradients(group)
    buffers(group)
    group.shutdown()
    group.shutdown()  # a second time does no harm


def exchange(group: process_group.ProcessGroup) -> None:
    assert group.all_gather([0.1 + group.rank, 2.0**53 - 1]) == [[0.1, 2.0**53 - 1], [1.1, 2.0**53 - 1]]
    assert group.broadcast({"from": group.rank}) == {"from": 0}


def gradients(group: process_group.ProcessGroup) -> None:
    """Unequal shares (3 and 1 examples), weighted as `core.api.types.Batch` says."""
    torch.manual_seed(group.rank)  # the ranks start apart: DistributedDataParallel takes rank 0's parameters
    model = process_group.distribute(nn.Linear(5, 3), CPU, bucket_cap_mb=25.0)
    x_NF = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    mine = x_NF[:3] if group.rank == 0 else x_NF[3:]
    (model(mine).square().mean() * len(mine) * group.world_size / len(x_NF)).backward()
    alone = nn.Linear(5, 3)
    alone.load_state_dict(model.module.state_dict())
    alone(x_NF).square().mean().backward()
    torch.testing.assert_close(model.module.weight.grad, alone.weight.grad, rtol=0, atol=1e-6)


def buffers(group: process_group.ProcessGroup) -> None:
    model = nn.Module()
    model.register_buffer("apart", torch.tensor([1.0, 2.0]) * (1 + 2 * group.rank))
    model.register_buffer("alike", torch.tensor([0.1, 1e-30]))
    model.register_buffer("count", torch.tensor(5))
    process_group.average_buffers(model)
    assert model.apart.tolist() == [2.0, 4.0]
    assert torch.equal(model.alike, torch.tensor([0.1, 1e-30]))
    assert model.count.item() == 5


def dead_peer() -> None:
    group = process_group.join("gloo", CPU, 60.0)
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        group.all_gather([0.0])
    except RuntimeError:
        group.shutdown()
        return
    raise AssertionError("a collective with a dead peer did not fail")


def hung_peer() -> None:
    group = process_group.join("gloo", CPU, 600.0)
    _, hung = group.all_gather([float(os.getpid())])
    if group.rank == 1:
        time.sleep(600)  # until rank 0 has left
    try:
        pending = dist.all_reduce(torch.zeros(4), async_op=True)
        process_group.SHUTDOWN_SECONDS = 1.0
        start = time.perf_counter()
        group.shutdown()
        assert time.perf_counter() - start < 5.0
        assert not pending.is_completed()
    finally:
        os.kill(int(hung[0]), signal.SIGKILL)


if __name__ == "__main__":
    {f.__name__: f for f in (agree, dead_peer, hung_peer)}[sys.argv[1]]()
