"""LAMB and the schedule against their formulas, written out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from timetrial_bert.optim import LAMB, Schedule
from timetrial_bert.workload import BertWorkload

pytestmark = pytest.mark.numbers

MakeWorkload = Callable[..., BertWorkload]


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_lamb_is_the_written_out_formula(correction: bool, tensor_rate: bool) -> None:
    beta_1, beta_2, eps, decay, limit = 0.8, 0.95, 1e-6, 0.01, 1.5
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    groups = [{"params": [weight]}, {"params": [bias], "adapt": False, "weight_decay": 0.0}]
    optimizer = LAMB(
        groups, torch.tensor(0.5) if tensor_rate else 0.5, betas=(beta_1, beta_2), eps=eps, weight_decay=decay,
        bias_correction=correction, max_grad_norm=limit,
    )  # fmt: skip
    expected = {p: p.detach().double().clone() for p in (weight, bias)}
    m, v = ({p: torch.zeros_like(t) for p, t in expected.items()} for _ in range(2))
    for t, lr in enumerate((0.5, 0.25, 0.125), 1):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr) if tensor_rate else lr
        weight.grad, bias.grad = torch.randn(3, 4), torch.randn(3) / t
        norm = torch.cat([weight.grad.flatten(), bias.grad]).double().norm()
        for p, w in expected.items():
            assert p.grad is not None
            g = p.grad.double() * min(1.0, limit / norm)
            m[p] = beta_1 * m[p] + (1 - beta_1) * g
            v[p] = beta_2 * v[p] + (1 - beta_2) * g**2
            mm, vv = (m[p] / (1 - beta_1**t), v[p] / (1 - beta_2**t)) if correction else (m[p], v[p])
            u = mm / (vv.sqrt() + eps) + (decay * w if p is weight else 0)
            expected[p] = w - lr * (w.norm() / u.norm() if p is weight else 1) * u
        optimizer.step()
    for p, w in expected.items():
        torch.testing.assert_close(p.detach().double(), w, atol=1e-6, rtol=1e-5)


def test_lamb_trusts_fully_where_a_norm_is_zero_and_leaves_ungraded_parameters_alone() -> None:
    weight, other = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2, 2)
    LAMB([weight, other], 0.1, max_grad_norm=None, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))
    assert torch.equal(other.detach(), torch.ones(2))


def test_lamb_resumes_with_the_same_bits() -> None:
    def steps(optimizer: LAMB, weight: nn.Parameter, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(3):
            weight.grad = torch.randn(3, 4)
            optimizer.step()

    one, two = (nn.Parameter(torch.arange(12.0).view(3, 4)) for _ in range(2))
    first = LAMB([one], 0.1)
    steps(first, one, 1)
    two.data.copy_(one.data)
    second = LAMB([two], 0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # else both would share their tensors
    steps(first, one, 2)
    steps(second, two, 2)
    assert torch.equal(one, two)
    assert second.state[two]["step"] == 6


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
