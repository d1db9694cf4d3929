"""LAMB, the schedule and the average of the weights against their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from timetrial_rnnt.ema import AverageWeights
from timetrial_rnnt.optim import LAMB, Schedule

pytestmark = pytest.mark.numbers


@pytest.mark.parametrize("clip", [None, 0.7])
def test_lamb_is_the_written_out_formula(clip: float | None) -> None:
    beta_1, beta_2, eps, decay = 0.9, 0.99, 1e-9, 1e-3
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.zeros(2))]
    optimizer = LAMB(parameters, 0.1, betas=(beta_1, beta_2), eps=eps, weight_decay=decay, max_grad_norm=clip)
    weights = [p.detach().double() for p in parameters]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for step, lr in enumerate((0.1, 0.05, 0.02), 1):
        for p in parameters:
            p.grad = torch.randn_like(p)
        grads = [p.grad.double() for p in parameters if p.grad is not None]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        scale = min(1.0, clip / norm) if clip else 1.0
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for number, (w, g) in enumerate(zip(weights, grads, strict=True)):
            m, v = moments[number]
            m, v = beta_1 * m + (1 - beta_1) * scale * g, beta_2 * v + (1 - beta_2) * (scale * g).square()
            moments[number] = (m, v)
            u = m / (1 - beta_1**step) / ((v / (1 - beta_2**step)).sqrt() + eps) + decay * w
            trust = w.norm() / u.norm() if w.norm() > 0 else 1.0
            weights[number] = w - lr * trust * u
    for p, w in zip(parameters, weights, strict=True):
        torch.testing.assert_close(p.detach().double(), w, atol=1e-6, rtol=1e-5)


def test_the_schedule_is_the_references() -> None:
    """common/optimizers.py, lr_policy: its steps and epochs count from 1."""

    def reference(step: int, epoch: int) -> float:
        warmup, hold = 2 * 10, 3 * 10
        if step < warmup:
            a = (step + 1) / (warmup + 1)
        elif step < warmup + hold:
            a = 1.0
        else:
            a = 0.9 ** (epoch - 2 - 3)
        return max(a * 0.5, 0.2)

    schedule = Schedule(base=0.5, minimum=0.2, steps_per_epoch=10, warmup_epochs=2, hold_epochs=3, decay=0.9)
    for step in range(200):
        assert schedule(step) == pytest.approx(reference(step + 1, step // 10 + 1))
    assert schedule(199) == 0.2


def test_the_average_follows_the_weights_and_is_what_is_evaluated() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = AverageWeights([weight], 0.9)
    expected = torch.tensor([1.0, 2.0])
    for step in range(5):
        with torch.no_grad():
            weight += step
        average.update()
        expected = 0.9 * expected + 0.1 * weight.detach()
    kept = weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), kept)
    with pytest.raises(ZeroDivisionError), average.in_place():
        raise ZeroDivisionError
    assert torch.equal(weight.detach(), kept)
