"""The schedule and the average of the weights against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from timetrial_rnnt.ema import AverageWeights
from timetrial_rnnt.schedule import Schedule

pytestmark = pytest.mark.numbers


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
