"""The baseline's loss against the sum over all alignments, written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from timetrial_rnnt.layers import Joint, Sizes
from timetrial_rnnt.loss import transducer_loss

pytestmark = pytest.mark.numbers

SIZES = Sizes(
    features=6, classes=5, encoder_hidden=10, pre_layers=1, stack_time=2, post_layers=1, predictor_hidden=9,
    predictor_layers=1, joint_hidden=8, encoder_dropout=0.0, predictor_dropout=0.0, joint_dropout=0.0,
)  # fmt: skip


def all_alignments(logits_TUV: torch.Tensor, labels: list[int], blank: int) -> float:
    """-log of the sum over every order of T blanks and U labels, of which the last one is a blank."""
    frames, total = logits_TUV.shape[0], 0.0
    logs = logits_TUV.double().log_softmax(-1)
    steps = frames - 1 + len(labels)
    for places in itertools.combinations(range(steps), len(labels)):
        t = u = 0
        log = 0.0
        for step in range(steps):
            if step in places:
                log, u = log + float(logs[t, u, labels[u]]), u + 1
            else:
                log, t = log + float(logs[t, u, blank]), t + 1
        total += math.exp(log + float(logs[t, u, blank]))
    return -math.log(total)


def test_it_is_the_sum_over_all_alignments_whatever_the_padding_holds() -> None:
    torch.manual_seed(0)
    joint = Joint(SIZES)
    encoded, predicted = torch.randn(3, 6, 8), torch.randn(3, 5, 8)
    labels, frames, symbols = torch.randint(4, (3, 4)), torch.tensor([4, 5, 1]), torch.tensor([2, 3, 0])
    losses = transducer_loss(joint, encoded, predicted, labels, frames, symbols)
    logits = joint(encoded, predicted).detach()
    for row in range(3):
        t, u = int(frames[row]), int(symbols[row])
        expected = all_alignments(logits[row, :t, : u + 1], labels[row, :u].tolist(), joint.blank)
        torch.testing.assert_close(losses[row].item(), expected, rtol=1e-5, atol=1e-5)
    encoded[0, 4:], predicted[0, 3:], labels[0, 2:] = 1e3, 1e3, 3
    torch.testing.assert_close(transducer_loss(joint, encoded, predicted, labels, frames, symbols), losses)


def test_padding_has_no_gradient() -> None:
    torch.manual_seed(0)
    joint = Joint(SIZES)
    encoded, predicted = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    lengths, symbols = torch.tensor([4, 6]), torch.tensor([2, 4])
    transducer_loss(joint, encoded, predicted, torch.randint(4, (2, 4)), lengths, symbols).sum().backward()
    assert encoded.grad is not None and predicted.grad is not None
    assert not encoded.grad[0, 4:].any() and not predicted.grad[0, 3:].any()
    assert encoded.grad[0, 3].any() and predicted.grad[0, 2].any()
