"""The groups of the optimizer, and the schedule against its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from timetrial_bert.schedule import Schedule
from timetrial_bert.workload import BertWorkload

pytestmark = pytest.mark.numbers

MakeWorkload = Callable[..., BertWorkload]


def test_biases_and_layer_normalisation_neither_decay_nor_adapt(make: MakeWorkload) -> None:
    workload = make("bert_mlperf", "size=tiny", "init_checkpoint=null")
    model = workload.build_model()
    decaying, exempt = workload.build_optimizer(model).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in exempt["params"]} == {
        n for n in names.values() if n.endswith("bias") or "LayerNorm" in n
    }
    assert len(decaying["params"]) + len(exempt["params"]) == len(names)
    assert (decaying["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    assert (decaying["adapt"], exempt["adapt"]) == (True, False)


def test_poly_schedule_of_the_closed_configuration(make: MakeWorkload) -> None:
    rate = make("bert_mlperf").learning_rate
    assert (rate(0), rate(50)) == (0, pytest.approx(0.001))
    assert rate(100) == pytest.approx(0.002 * (1 - 100 / 1141))
    assert rate(1141) == rate(10**6) == 0


def test_a_warm_up_may_have_begun_before_the_first_step() -> None:
    rate = Schedule(base=1.0, warmup_steps=300, start_warmup_step=-100, training_steps=500, power=1.0)
    assert rate(0) == pytest.approx(1 / 3)
    assert rate(199) == pytest.approx(299 / 300)
    assert rate(200) == pytest.approx(0.6)
