"""LARS and the schedules against their formulas, written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from timetrial_resnet.optim import LARS, Schedule
from timetrial_resnet.workload import ResNetWorkload

pytestmark = pytest.mark.numbers

MakeWorkload = Callable[..., ResNetWorkload]


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_lars_is_the_written_out_formula(tensor_rate: bool) -> None:
    momentum, decay, eeta = 0.9, 0.01, 0.02
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    groups = [{"params": [weight]}, {"params": [bias], "adapt": False}]
    rate = torch.tensor(0.5) if tensor_rate else 0.5
    optimizer = LARS(groups, rate, momentum=momentum, weight_decay=decay, eeta=eeta)
    w, b = weight.detach().double(), bias.detach().double()
    velocity_w, velocity_b = torch.zeros_like(w), torch.zeros_like(b)
    for lr in (0.5, 0.25, 0.125):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr) if tensor_rate else lr
        weight.grad, bias.grad = torch.randn(3, 4), torch.randn(3)
        g = weight.grad.double()
        trust = eeta * w.norm() / (g.norm() + decay * w.norm())
        velocity_w = momentum * velocity_w + lr * trust * (g + decay * w)
        velocity_b = momentum * velocity_b + lr * bias.grad.double()
        w, b = w - velocity_w, b - velocity_b
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), w, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bias.detach().double(), b, atol=1e-6, rtol=1e-5)


def test_lars_trusts_fully_where_a_norm_is_zero() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], 0.1).step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.1))


def test_biases_and_batch_norm_do_not_decay(make: MakeWorkload) -> None:
    for name, kind in (("resnet", torch.optim.SGD), ("resnet_mlperf", LARS)):
        workload = make(name, "arch=resnet8", source="synthetic")
        model = workload.build_model()
        optimizer = workload.build_optimizer(model)
        assert isinstance(optimizer, kind)
        decaying, exempt = optimizer.param_groups
        names = {id(p): n for n, p in model.named_parameters()}
        assert all(
            "conv" in names[id(p)] or names[id(p)].endswith(("fc.weight", "downsample.0.weight"))
            for p in decaying["params"]
        )
        assert all(p.ndim == 1 for p in exempt["params"])
        assert decaying["weight_decay"] > 0 and exempt["weight_decay"] == 0
        assert len(names) == len(decaying["params"]) + len(exempt["params"])


def test_poly_schedule_at_its_key_points(make: MakeWorkload) -> None:
    """The closed configuration: 786 steps an epoch, of which 2 epochs are warm-up."""
    rate = make("resnet_mlperf", source="synthetic").learning_rate
    assert rate(0) == 0
    assert rate(786) == pytest.approx(3.7)
    assert rate(1572) == pytest.approx(7.4)
    assert rate(1572 + 27476 // 2) == pytest.approx(0.0001 + (7.4 - 0.0001) / 4)
    assert rate(1572 + 27476) == rate(10**6) == pytest.approx(0.0001)


def test_cosine_schedule_at_its_key_points() -> None:
    rate = Schedule(family="cosine", base=1.0, end=0.2, warmup_steps=10, decay_steps=100, power=2)
    assert [rate(s) for s in (0, 5, 10)] == [0, 0.5, 1.0]
    assert rate(60) == pytest.approx(0.6)
    assert rate(85) == pytest.approx(0.2 + 0.4 * (1 + math.cos(0.75 * math.pi)))
    assert rate(110) == rate(1000) == pytest.approx(0.2)
