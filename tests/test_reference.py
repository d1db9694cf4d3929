"""Each optimizer and schedule of core.api.reference against its formula, written out in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from core.api.reference import LAMB, LARS, parameter_groups, polynomial_decay

pytestmark = pytest.mark.numbers

RATES = (0.5, 0.25, 0.125)


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))


def set_rate(optimizer: torch.optim.Optimizer, rate: float, tensor: bool) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(rate) if tensor else rate


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_lars_is_the_written_out_formula(tensor_rate: bool) -> None:
    momentum, decay, eeta, epsilon = 0.9, 0.01, 0.02, 0.5
    weight, bias = parameters()
    groups = [{"params": [weight]}, {"params": [bias], "adapt": False}]
    optimizer = LARS(groups, 0.5, momentum=momentum, weight_decay=decay, eeta=eeta, epsilon=epsilon)
    w, b = weight.detach().double(), bias.detach().double()
    velocity_w, velocity_b = torch.zeros_like(w), torch.zeros_like(b)
    for lr in RATES:
        set_rate(optimizer, lr, tensor_rate)
        weight.grad, bias.grad = torch.randn(3, 4), torch.randn(3)
        g = weight.grad.double()
        trust = eeta * w.norm() / (g.norm() + decay * w.norm() + epsilon)
        velocity_w = momentum * velocity_w + lr * trust * (g + decay * w)
        velocity_b = momentum * velocity_b + lr * bias.grad.double()
        w, b = w - velocity_w, b - velocity_b
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), w, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bias.detach().double(), b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tensor_rate", [False, True])
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("limit", [None, 1.5])
def test_lamb_is_the_written_out_formula(tensor_rate: bool, correction: bool, limit: float | None) -> None:
    beta_1, beta_2, eps, decay = 0.8, 0.95, 1e-6, 0.01
    weight, bias = parameters()
    groups = [{"params": [weight]}, {"params": [bias], "adapt": False, "weight_decay": 0.0}]
    optimizer = LAMB(
        groups, 0.5, betas=(beta_1, beta_2), eps=eps, weight_decay=decay, bias_correction=correction,
        max_grad_norm=limit,
    )  # fmt: skip
    expected: dict[Tensor, Tensor] = {p: p.detach().double().clone() for p in (weight, bias)}
    m, v = ({p: torch.zeros_like(t) for p, t in expected.items()} for _ in range(2))
    for t, lr in enumerate(RATES, 1):
        set_rate(optimizer, lr, tensor_rate)
        weight.grad, bias.grad = torch.randn(3, 4), torch.randn(3) / t
        norm = torch.cat([weight.grad.flatten(), bias.grad]).double().norm()  # of both groups
        for p, w in expected.items():
            assert p.grad is not None
            g = p.grad.double() * (min(1.0, limit / norm) if limit else 1.0)
            m[p] = beta_1 * m[p] + (1 - beta_1) * g
            v[p] = beta_2 * v[p] + (1 - beta_2) * g**2
            mm, vv = (m[p] / (1 - beta_1**t), v[p] / (1 - beta_2**t)) if correction else (m[p], v[p])
            u = mm / (vv.sqrt() + eps) + (decay * w if p is weight else 0)
            expected[p] = w - lr * (w.norm() / u.norm() if p is weight else 1) * u
        optimizer.step()
    for p, w in expected.items():
        torch.testing.assert_close(p.detach().double(), w, atol=1e-6, rtol=1e-5)


def test_both_trust_fully_where_a_norm_is_zero() -> None:
    makers: list[Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = [
        lambda weights: LARS(weights, 0.1),
        lambda weights: LAMB(weights, 0.1, max_grad_norm=None, weight_decay=0.5),
    ]
    for make in makers:
        weight = nn.Parameter(torch.zeros(2, 2))
        weight.grad = torch.ones(2, 2)
        make([weight]).step()
        torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_a_parameter_without_a_gradient_is_left_alone(kind: type[torch.optim.Optimizer]) -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = kind([used, unused], lr=0.1)  # pyright: ignore[reportCallIssue]
    optimizer.step()  # no gradient at all
    assert torch.equal(used, torch.ones(2))
    used.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(used, torch.ones(2))
    assert torch.equal(unused, torch.ones(2)) and unused not in optimizer.state


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_training_goes_on_with_the_same_bits_from_a_loaded_state(kind: type[torch.optim.Optimizer]) -> None:
    def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(3):
            weight.grad = torch.randn(3, 4)
            optimizer.step()

    one, two = (nn.Parameter(torch.arange(12.0).view(3, 4)) for _ in range(2))
    first = kind([one], lr=0.1)  # pyright: ignore[reportCallIssue]
    steps(first, one, 1)
    two.data.copy_(one.data)
    second = kind([two], lr=0.1)  # pyright: ignore[reportCallIssue]
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # else both would share their tensors
    steps(first, one, 2)
    steps(second, two, 2)
    assert torch.equal(one, two)


def test_checkpoints_find_these_keys() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    lars, lamb = LARS([weight], 0.1), LAMB([weight], 0.1)
    lars.step()
    lamb.step()
    assert lars.param_groups[0].keys() == {
        "params", "lr", "momentum", "weight_decay", "eeta", "epsilon", "adapt",
    }  # fmt: skip
    assert lamb.param_groups[0].keys() == {
        "params", "lr", "betas", "eps", "weight_decay", "bias_correction", "max_grad_norm", "adapt", "capturable",
    }  # fmt: skip
    assert lars.state[weight].keys() == {"momentum_buffer"}
    assert lamb.state[weight].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert lamb.state[weight]["step"].dtype == torch.float32


def test_what_has_one_dimension_does_not_decay_and_what_is_frozen_is_in_no_group() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    decaying, exempt = parameter_groups(model, 0.1)
    assert decaying == {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1}
    assert exempt == {
        "params": [model[0].bias, model[1].weight, model[1].bias, model[2].bias], "weight_decay": 0.0,
    }  # fmt: skip


def test_polynomial_decay_at_its_key_points() -> None:
    def rate(step: float) -> float:
        return polynomial_decay(step, base=1.0, end=0.2, steps=100, power=2)

    assert [rate(step) for step in (0, 50, 100, 10**6)] == [1.0, pytest.approx(0.4), 0.2, 0.2]
