"""The groups of the optimizer, and the schedules against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from core.api.reference import LARS
from timetrial_resnet.schedule import Schedule
from timetrial_resnet.workload import ResNetWorkload

pytestmark = pytest.mark.numbers

MakeWorkload = Callable[..., ResNetWorkload]


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
