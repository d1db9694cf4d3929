"""What each rank does in `test_gradient_compression.py`, with RANK and the like in the environment.

Four ranks as data 2 x tensor 2: ranks 0 and 2 hold one part of the model, 1 and 3 the other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core.api.mesh import Dimension, Mesh, arrange
from timetrial_gradient_compression.exchange import Bf16, PowerSgd

TENSOR = Dimension(name="tensor", size=2, splits_data=False, nearness=30)


def main() -> None:
    rank, part = dist.get_rank(), dist.get_rank() % 2
    mesh = Mesh(arrange([TENSOR], dist.get_world_size()), rank).device_mesh("cpu")["data"]
    exchanges = [Bf16(mesh)]
    if not torch.cuda.is_available():  # else torch's PowerSGD would wait for the GPU
        exchanges.append(PowerSgd(mesh, rank=1, start_step=2, min_rate=0.5, seed=5))
    for exchange in exchanges:
        model = DistributedDataParallel(nn.Linear(2 + part, 3, bias=False), process_group=mesh.get_group())
        model.register_comm_hook(None, exchange.exchange)
        for _ in range(4):
            model.zero_grad()
            model(torch.full((1, 2 + part), float(rank))).sum().backward()
        mean = torch.full((3, 2 + part), part + 1.0)  # of 0 and 2, or of 1 and 3
        torch.testing.assert_close(model.module.weight.grad, mean, rtol=1e-3, atol=1e-3)
        assert exchange.compressed.sent > 0


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
