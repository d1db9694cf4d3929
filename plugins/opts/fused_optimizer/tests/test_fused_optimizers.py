"""Each fused optimizer against the one that it replaces, and what the kernels would silently get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.api.errors import UsageError
from core.api.reference import LAMB, LARS
from timetrial_fused_optimizer.optimizers import fuse

pytestmark = pytest.mark.numbers

pytestmark = pytest.mark.numbers

STEPS = 50
DECAY = 0.05
Make = Callable[[nn.Module], torch.optim.Optimizer]


def groups(model: nn.Module, **others: Any) -> list[dict[str, Any]]:
    """Matrices, which decay; and the rest, which does not and has these further settings."""
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0, **others},
    ]


def lars(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return LARS(groups(model, adapt=False), lr=0.1, eeta=0.02, **settings)


def lamb(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return LAMB(groups(model, adapt=False), lr=0.01, **settings)


BASELINES: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(groups(m), lr=0.1),
    "SGD, momentum": lambda m: torch.optim.SGD(groups(m), lr=0.1, momentum=0.9),
    "SGD, Nesterov": lambda m: torch.optim.SGD(groups(m), lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda m: torch.optim.AdamW(groups(m), lr=0.01),
    "AdamW, AMSGrad": lambda m: torch.optim.AdamW(groups(m), lr=0.01, amsgrad=True),
    "LARS": lars,
    "LARS, epsilon": lambda m: lars(m, epsilon=0.01),
    "LAMB, clipping": lambda m: lamb(m, max_grad_norm=0.5),
    "LAMB, no clipping": lambda m: lamb(m, max_grad_norm=None),
    "LAMB, no bias correction": lambda m: lamb(m, bias_correction=False),
}


def network() -> nn.Module:
    """Parameters of one, two and four dimensions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8 * 16, 12),
            nn.Linear(12, 5),
        )


def rate(step: int) -> float:
    """Up, then down: another one at each step."""
    return 0.02 * min(step + 1, 10) / 10 * (1 - step / (2 * STEPS))


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """As core/engine/loop.py does."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], float):
            group["lr"] = value
        else:
            group["lr"].fill_(value)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    """The parameters, flattened, after each step. Gradients are drawn and not of a loss, through which each step would
    amplify a difference of rounding; they are large at first, so that clipping is not always on."""
    history: list[Tensor] = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        set_rate(optimizer, rate(step))
        for p in model.parameters():
            p.grad = 0.1 * 0.9**step * torch.randn(p.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return history


@pytest.mark.parametrize("name", BASELINES)
def test_each_of_50_steps_gives_the_baselines_parameters(name: str) -> None:
    theirs, ours = network(), network()
    baseline, fused = BASELINES[name](theirs), fuse(BASELINES[name](ours))
    for expected, got in zip(train(theirs, baseline, range(STEPS)), train(ours, fused, range(STEPS)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_it_continues_from_the_baselines_state_and_hands_its_own_back(name: str) -> None:
    theirs, ours = network(), network()
    baseline, other = BASELINES[name](theirs), BASELINES[name](ours)
    expected = train(theirs, baseline, range(STEPS))[-1]
    train(ours, other, range(10))
    fused = fuse(BASELINES[name](ours))
    fused.load_state_dict(other.state_dict())
    train(ours, fused, range(10, 20))
    other.load_state_dict(fused.state_dict())
    torch.testing.assert_close(train(ours, other, range(20, STEPS))[-1], expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_its_operations_do_not_grow_with_the_number_of_parameters_and_the_host_reads_none(name: str) -> None:
    counts: list[tuple[int, int, int]] = []
    for layers in (2, 20):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
        fused = fuse(BASELINES[name](model))
        model(torch.ones(2, 3)).sum().backward()
        fused.step()
        assert fused.seen is not None and fused.seen.tensors == 2 * layers
        counts.append((fused.seen.multi_tensor, fused.seen.host_reads, fused.seen.single - 2 * layers))
    (few, reads, _), (many, reads_too, _) = counts
    assert few == many > 0
    assert reads == reads_too == 0


@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW", "LARS", "LAMB, clipping"])
def test_a_gradient_and_a_restored_state_in_another_memory_layout_are_applied_to_the_right_elements(name: str) -> None:
    plain, strided = network(), network().to(memory_format=torch.channels_last)
    assert not strided[0].weight.is_contiguous()
    expected, fused = fuse(BASELINES[name](plain)), fuse(BASELINES[name](strided))
    train(plain, expected, range(3))
    train(strided, fused, range(3))
    state = fused.state_dict()
    for entry in state["state"].values():  # as a checkpoint brings it back
        entry.update({key: value.contiguous() for key, value in entry.items()})
    fused.load_state_dict(state)
    for model in (plain, strided):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    expected.step()
    fused.step()
    for a, b in zip(plain.parameters(), strided.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    fused = fuse(torch.optim.AdamW([used, unused], lr=0.1))
    used.grad = torch.ones(3)
    fused.step()
    assert not torch.equal(used, torch.ones(3))
    assert torch.equal(unused, torch.ones(3)) and fused.state[unused]["step"] == 0


def test_the_learning_rate_stays_the_same_tensor_when_a_state_is_loaded() -> None:
    model = network()
    fused = fuse(BASELINES["SGD"](model))
    before = [group["lr"] for group in fused.param_groups]
    set_rate(fused, 0.25)
    state = fused.state_dict()
    set_rate(fused, 0.5)
    fused.load_state_dict(
        {**state, "param_groups": [{**g, "lr": g["lr"].clone() * 0.5} for g in state["param_groups"]]}
    )
    assert all(group["lr"] is lr for group, lr in zip(fused.param_groups, before, strict=True))
    assert [float(lr) for lr in before] == [0.25, 0.25]


def test_an_unknown_optimizer_is_named_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"Adagrad: leave it out; .*SGD.*AdamW.*LARS.*LAMB"):
        fuse(torch.optim.Adagrad(network().parameters()))


def test_a_subclass_of_a_known_optimizer_is_unknown_since_its_step_may_be_another() -> None:
    class Other(LAMB):
        pass

    with pytest.raises(UsageError, match=r"does not support the optimizer .*Other"):
        fuse(Other(network().parameters(), lr=0.1))


def test_dampening_and_mixed_formats_are_refused() -> None:
    with pytest.raises(UsageError, match="dampening"):
        fuse(torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9, dampening=0.1))
    model = network()
    model[4].double()
    with pytest.raises(UsageError, match="one dtype"):
        fuse(torch.optim.SGD(model.parameters(), lr=0.1))
