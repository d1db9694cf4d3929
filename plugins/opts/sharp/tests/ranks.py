"""What each rank does in the tests: `python ranks.py SCENARIO`, with RANK and the like in the environment."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.api.mesh import Dimension, Mesh, arrange
from core.testing.hosts import bytes_sent
from timetrial_sharp.nodes import launched, launcher_node, sets_of_peers
from timetrial_sharp.two_level import TwoLevel

CPU = torch.device("cpu")
WIDTH, LAYERS = 512, 16
GRADIENT_BYTES = LAYERS * WIDTH * WIDTH * 4


def two_level(chunk_bytes: int, dimensions: tuple[Dimension, ...] = ()) -> TwoLevel:
    numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, torch.tensor([launcher_node()]))
    sets = sets_of_peers(launched([int(n) for n in numbers]), Mesh(arrange(dimensions, len(numbers))))
    return TwoLevel(sets, dist.get_rank(), CPU, chunk_bytes, timedelta(seconds=60))


def link() -> None:
    """Gradients by torch's own all-reduce and by ours: the bytes that this host sent for each, and the same values."""
    torch.manual_seed(0)
    found, gradients = {}, {}
    for name in ("flat", "two_level"):
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
        model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=4.0)
        if name == "two_level":
            model.register_comm_hook(None, two_level(2**20).exchange)
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
        for _ in range(3):  # after the first, the buckets are regrouped
            model.zero_grad()
            dist.barrier()
            before = bytes_sent()
            model(x).square().mean().backward()
            dist.barrier()
            found[name] = (bytes_sent() - before) / GRADIENT_BYTES
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradients["two_level"], gradients["flat"])
    print(json.dumps(found))


def values() -> None:
    """Buffers of any length and format, several under way at once."""
    ours = two_level(chunk_bytes=256)
    lengths, dtypes = (1, 3, 64, 65, 1000), (torch.float32, torch.float64, torch.bfloat16)
    generator = torch.Generator().manual_seed(dist.get_rank())
    buffers = [torch.randn(n, generator=generator).to(dtype) for n in lengths for dtype in dtypes]
    expected = [flat(buffer) for buffer in buffers]
    futures = [ours.average(buffer) for buffer in buffers]
    for buffer, mean, future in zip(buffers, expected, futures, strict=True):
        assert future.wait() is buffer
        rounding = 8 * torch.finfo(buffer.dtype).eps  # three sums of numbers below 8, divided by 4
        torch.testing.assert_close(buffer, mean, rtol=0, atol=rounding)
    shares = [-(-n // ours.nodes.ranks_per_node) for n in lengths]
    assert ours.traffic.buckets == len(buffers)
    assert ours.traffic.gradient_bytes == sum(lengths) * (4 + 8 + 2)
    assert ours.traffic.across_bytes == sum(shares) * (4 + 8 + 2)


def flat(buffer: Tensor) -> Tensor:
    mean = buffer.to(torch.float64, copy=True)
    dist.all_reduce(mean)
    return (mean / dist.get_world_size()).to(buffer.dtype)


def split_model() -> None:
    """Ranks as data 2 x tensor 2: ranks 0 and 2 hold one part of the model, 1 and 3 the other."""
    ours = two_level(256, (Dimension(name="tensor", size=2, splits_data=False, nearness=30),))
    part = dist.get_rank() % 2
    buffer = torch.full((65 + part,), float(dist.get_rank()))
    ours.average(buffer).wait()
    assert torch.equal(buffer, torch.full((65 + part,), 1.0 + part))  # the mean of 0 and 2, or of 1 and 3


def dead_peer() -> None:
    ours = two_level(chunk_bytes=2**20)
    if dist.get_rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    model = DistributedDataParallel(nn.Linear(4, 4), init_sync=False)
    model.register_comm_hook(None, ours.exchange)
    start = time.perf_counter()
    try:
        model(torch.ones(1, 4)).sum().backward()
    except RuntimeError as error:
        assert time.perf_counter() - start < 30
        print(error)
        return
    raise AssertionError("an all-reduce with a dead peer did not fail")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {f.__name__: f for f in (link, values, split_model, dead_peer)}[sys.argv[1]]()
    dist.destroy_process_group()
