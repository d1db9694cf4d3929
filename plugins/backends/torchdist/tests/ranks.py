"""What each rank does in `test_gloo.py`: `python ranks.py SCENARIO`, with RANK and the like in the environment."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

from core.api.mesh import Dimension, Mesh, arrange
from timetrial_torchdist import process_group
from timetrial_torchdist.buffers import average_buffers, data_group

CPU = torch.device("cpu")


def agree() -> None:
    """One process group for all three: starting a process costs more than what it checks."""
    group = process_group.join("gloo", CPU, 60.0)
    exchange(group)
    buffers(group)
    group.shutdown()
    group.shutdown()  # a second time does no harm


def exchange(group: process_group.ProcessGroup) -> None:
    assert group.all_gather([0.1 + group.rank, 2.0**53 - 1]) == [[0.1, 2.0**53 - 1], [1.1, 2.0**53 - 1]]
    assert group.broadcast({"from": group.rank}) == {"from": 0}


def buffers(group: process_group.ProcessGroup) -> None:
    model = nn.Module()
    model.register_buffer("apart", torch.tensor([1.0, 2.0]) * (1 + 2 * group.rank))
    model.register_buffer("alike", torch.tensor([0.1, 1e-30]))
    model.register_buffer("count", torch.tensor(5))
    average_buffers(model)
    assert model.apart.tolist() == [2.0, 4.0]
    assert torch.equal(model.alike, torch.tensor([0.1, 1e-30]))
    assert model.count.item() == 5


def data_peers() -> None:
    """Four ranks as data 2 x tensor 2: ranks 0 and 2 hold one part of the model, 1 and 3 the other."""
    group = process_group.join("gloo", CPU, 60.0)
    tensor = Dimension(name="tensor", size=2, splits_data=False, nearness=30)
    model, part = nn.Module(), group.rank % 2
    model.register_buffer("statistics", torch.full((1 + part,), float(group.rank)))
    average_buffers(model, data_group(Mesh(arrange([tensor], 4), group.rank)))
    assert model.statistics.tolist() == [1.0 + part] * (1 + part)  # the mean of 0 and 2, or of 1 and 3
    group.shutdown()


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
    {f.__name__: f for f in (agree, data_peers, dead_peer, hung_peer)}[sys.argv[1]]()
