"""SyncBatchNorm2d on two gloo ranks with unequal shares against one-process batch normalisation.

Run as a program, this file is one of the ranks: `test_resnet_norm.py FOLDER`, with RANK in the environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.testing.cli import run_program
from timetrial_resnet.norm import SyncBatchNorm2d

pytestmark = pytest.mark.numbers

CHANNELS, SHARES = 3, (5, 2)
STEPS = 2


def _layer(kind: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    layer = kind(CHANNELS)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        layer.bias.copy_(torch.tensor([0.0, -1.0, 3.0]))
    return layer


def _images(step: int) -> tuple[Tensor, Tensor]:
    """Images far from zero, where E[x^2] - E[x]^2 in float32 would be noise; and a gradient for the output."""
    generator = torch.Generator().manual_seed(step)
    shape = (sum(SHARES), CHANNELS, 4, 4)
    return 1000 + torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _train(layer: nn.BatchNorm2d, part: slice) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        x, dy = (t[part] for t in _images(step))
        x = x.clone().requires_grad_()
        y = layer(x)
        layer.zero_grad()
        y.backward(dy)
        assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
        found = {"y": y.detach(), "dx": x.grad, "dgamma": layer.weight.grad, "dbeta": layer.bias.grad}
    return found | {f"buffer.{name}": value for name, value in layer.named_buffers()}


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    ranks = run_program(Path(__file__), str(tmp_path), nodes="00")
    expected = _train(_layer(nn.BatchNorm2d), slice(None))
    for rank in ranks:
        rank.expect(0)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in ("y", "dx"):
        torch.testing.assert_close(torch.cat([f[name] for f in found]), expected[name], atol=1e-3, rtol=1e-3)
    for name in ("dgamma", "dbeta"):
        torch.testing.assert_close(found[0][name] + found[1][name], expected[name], atol=1e-2, rtol=1e-3)
    for name in (n for n in expected if n.startswith("buffer.")):
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], expected[name])


def test_one_process_is_batch_norm_itself() -> None:
    ours, theirs = (_train(_layer(kind), slice(None)) for kind in (SyncBatchNorm2d, nn.BatchNorm2d))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_state_dict_is_that_of_batch_norm() -> None:
    nn.BatchNorm2d(CHANNELS).load_state_dict(SyncBatchNorm2d(CHANNELS).state_dict())


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    start = sum(SHARES[:rank])
    torch.save(_train(_layer(SyncBatchNorm2d), slice(start, start + SHARES[rank])), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(int(os.environ["RANK"]), Path(sys.argv[1]))
