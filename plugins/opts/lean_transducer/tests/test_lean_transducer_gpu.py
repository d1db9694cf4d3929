"""On a GPU: the loss and its gradients are those of the CPU, whatever goes through the lattice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from timetrial_lean_transducer.loss import LeanLoss
from timetrial_lean_transducer.pruning import SimpleJoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = torch.device("cuda")
WIDTH, VOCABULARY = 16, 30


def found(
    loss: LeanLoss, device: torch.device, lengths: list[tuple[int, int]], dtype: torch.dtype, dropout: float = 0.0
) -> list[Tensor]:
    """Losses, and the gradients of their sum by encoded, predicted and the joint network's parameters, on the CPU."""
    torch.manual_seed(0)
    frames, labels = torch.tensor(lengths).T
    joint = nn.Module()
    joint.dropout, joint.output, joint.blank = nn.Dropout(dropout), nn.Linear(WIDTH, VOCABULARY), VOCABULARY - 1
    if loss.span:
        joint.simple = SimpleJoint(WIDTH, VOCABULARY, seed=0)
    joint = joint.to(device, dtype)
    inputs = [torch.randn(len(lengths), int(n), WIDTH, dtype=dtype) for n in (frames.max(), labels.max() + 1)]
    encoded, predicted = (t.to(device).requires_grad_() for t in inputs)
    said = torch.randint(VOCABULARY - 1, (len(lengths), int(labels.max())))
    losses = loss(joint, encoded, predicted, *(t.to(device) for t in (said, frames, labels)))
    gradients = torch.autograd.grad(losses.sum(), [encoded, predicted, *joint.parameters()])
    return [t.detach().cpu() for t in (losses, *gradients)]


@pytest.mark.parametrize("recursion", ["torch", "triton"])
@pytest.mark.parametrize("span", [0, 3], ids=["exact", "pruned"])
@pytest.mark.parametrize("lengths", [[(50, 12), (31, 20), (1, 0)], [(20, 1100)]], ids=["short", "long"])
def test_it_is_what_the_cpu_computes(recursion: str, span: int, lengths: list[tuple[int, int]]) -> None:
    mine = found(LeanLoss(chunk=64, span=span, recursion=recursion), GPU, lengths, torch.float64)
    expected = found(LeanLoss(chunk=64, span=span), torch.device("cpu"), lengths, torch.float64)
    torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("recursion", ["torch", "triton"])
def test_the_same_call_gives_the_same_bits(recursion: str) -> None:
    runs = [found(LeanLoss(recursion=recursion), GPU, [(90, 30), (60, 40)], torch.float32, 0.3) for _ in range(2)]
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_dropout_masks_are_those_of_the_forward_pass_where_cells_are_left_out() -> None:
    lengths = [(90, 30), (60, 40)]
    few, all_ = (found(LeanLoss(chunk=64, negligible=n), GPU, lengths, torch.float64, 0.3) for n in (1e-9, 0.0))
    torch.testing.assert_close(few, all_, rtol=0, atol=1e-6)


def test_under_autocast_the_loss_is_float32_and_close() -> None:
    lengths = [(90, 30), (60, 40)]
    expected = found(LeanLoss(), GPU, lengths, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        mine = found(LeanLoss(), GPU, lengths, torch.float32)
    assert mine[0].dtype == torch.float32 and not torch.equal(mine[0], expected[0])
    torch.testing.assert_close(mine[0], expected[0], rtol=5e-3, atol=0)
    assert all((a - b).norm() < 0.03 * b.norm() for a, b in zip(mine[1:], expected[1:], strict=True))
