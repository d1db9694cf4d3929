"""The chunked loss against the plain one: values, exact gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from timetrial_bert.seams import IGNORED
from timetrial_fused_loss.loss import ChunkedLoss
from timetrial_fused_loss.memory import PeakMemory
from timetrial_fused_loss.plugin import FusedLoss, FusedLossConfig

pytestmark = pytest.mark.numbers


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, labels, reduction="sum", ignore_index=IGNORED)
    return loss, (logits.argmax(1) == labels).sum()


def inputs(positions: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """hidden, weight and bias, which want gradients, and labels, every third of them IGNORED."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((positions, hidden), (vocabulary, hidden), (vocabulary,))
    made = [torch.randn(*s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    labels = torch.randint(vocabulary, (positions,), generator=generator)
    labels[::3] = IGNORED
    return *made, labels


@pytest.mark.parametrize("chunk", [1, 4, 5, 64])
def test_gradients_are_exact_in_float64(chunk: int) -> None:
    *wanting, labels = inputs(10, 3, 7, torch.float64)
    loss = ChunkedLoss(chunk)
    assert torch.autograd.gradcheck(lambda *x: loss(*x, labels, count_correct=False)[0], wanting)
    ours = torch.autograd.grad(loss(*wanting, labels, count_correct=False)[0] * 0.3, wanting)
    theirs = torch.autograd.grad(plain(*wanting, labels)[0] * 0.3, wanting)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [7, 50, 1000])
def test_loss_gradients_and_count_are_those_of_the_plain_loss_in_float32(chunk: int) -> None:
    *wanting, labels = inputs(101, 16, 300)
    loss, correct = ChunkedLoss(chunk)(*wanting, labels, count_correct=True)
    expected, count = plain(*wanting, labels)
    torch.testing.assert_close(loss, expected)
    assert correct == count
    torch.testing.assert_close(torch.autograd.grad(loss, wanting), torch.autograd.grad(expected, wanting))


def test_under_autocast_products_are_bfloat16_and_the_rest_is_as_precise_as_the_plain_loss() -> None:
    *wanting, labels = inputs(64, 32, 200)
    exact = plain(*wanting, labels)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = ChunkedLoss(16)(*wanting, labels, count_correct=False)
        expected, _ = plain(*wanting, labels)
    assert loss.dtype == torch.float32
    assert loss != exact
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    ours, theirs = torch.autograd.grad(loss, wanting), torch.autograd.grad(expected, wanting)
    assert {g.dtype for g in ours} == {torch.float32}
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, bias, labels = inputs(6, 4, 9)
    loss, _ = ChunkedLoss(2)(hidden * 1e4, weight, bias, labels, count_correct=False)
    torch.testing.assert_close(loss, plain(hidden * 1e4, weight, bias, labels)[0])


def test_without_a_prediction_the_loss_and_its_gradients_are_zero() -> None:
    for positions in (0, 5):
        hidden, weight, bias, labels = inputs(positions, 4, 9)
        loss, correct = ChunkedLoss(2)(hidden, weight, bias, labels.fill_(IGNORED), count_correct=True)
        loss.backward()
        assert loss == 0 and correct == 0
        assert all(not t.grad.any() for t in (hidden, weight, bias))


def test_the_peak_is_one_chunk_of_logits_and_the_gradients() -> None:
    positions, vocabulary, chunk = 400, 2000, 25
    *wanting, labels = inputs(positions, 8, vocabulary)
    loss = ChunkedLoss(chunk)
    loss(*wanting, labels, count_correct=False)[0].backward()
    seen = loss.seen
    all_logits, one_chunk = positions * vocabulary * 4, chunk * vocabulary * 4
    assert (seen.logits_bytes, seen.chunk_bytes, seen.chunks) == (all_logits, one_chunk, 16)
    few = 20 * positions * 8  # a handful of numbers a position
    assert one_chunk <= seen.forward_peak <= 1.1 * one_chunk + few
    assert seen.backward_peak <= 1.1 * one_chunk + seen.gradient_bytes + vocabulary * 4 + few
    with PeakMemory() as memory:
        torch.autograd.grad(plain(*wanting, labels)[0], wanting)
    assert memory.peak >= 2 * all_logits > 10 * max(seen.forward_peak, seen.backward_peak)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary() -> None:
    kept: list[Any] = []
    *wanting, labels = inputs(50, 8, 3000)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ChunkedLoss(10)(*wanting, labels, count_correct=False)
    inputs_too = {t.untyped_storage().data_ptr() for t in wanting}
    assert all(t.numel() <= 50 for t in kept if t.untyped_storage().data_ptr() not in inputs_too)


def test_the_evidence_says_what_was_held_and_kept() -> None:
    opt = FusedLoss(FusedLossConfig(positions=8))
    assert not opt.verify().active
    (replacement,) = opt.replace()
    *wanting, labels = inputs(20, 4, 3000)
    loss, _ = replacement.make(plain)(*wanting, labels, count_correct=False)
    assert not opt.verify().active
    loss.backward()
    evidence = opt.verify()
    assert evidence.active
    assert evidence.summary.startswith("3 chunks of at most 8 positions: 0.09 MiB of logits at a time, not 0.23")
    assert evidence.figures["kept_bytes"] < 20 * 100
