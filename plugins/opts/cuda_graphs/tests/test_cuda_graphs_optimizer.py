"""Optimizers under capture, as far as a CPU shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from core.api.errors import UsageError
from timetrial_cuda_graphs.optimizer import make_capturable, replayable


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def run(function: Any) -> Any:
    function()
    return (lambda: None), {}


def test_sgd_reads_its_learning_rate_from_a_tensor_in_its_fused_kernel() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert make_capturable(optimizer, on_load=lambda: None)
    (group,) = optimizer.param_groups
    assert (group["lr"].item(), group["fused"], group["foreach"]) == (pytest.approx(0.1), True, False)
    before = model.weight.detach().clone()
    group["lr"].fill_(0.0)
    step(model, optimizer)
    assert torch.equal(model.weight, before)


def test_adamw_keeps_its_step_count_on_the_device() -> None:
    optimizer = torch.optim.AdamW(network().parameters(), lr=0.1)
    assert make_capturable(optimizer, on_load=lambda: None)
    assert optimizer.param_groups[0]["capturable"] is True


def test_an_optimizer_that_is_capturable_already_is_left_as_it_is() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD(network().parameters(), lr=rate, fused=True)
    assert not make_capturable(optimizer, on_load=lambda: None)
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("saved_with_graphs", [True, False])
def test_a_restored_learning_rate_keeps_its_address(saved_with_graphs: bool) -> None:
    model, forgotten = network(), []
    saved = torch.optim.SGD(network().parameters(), lr=0.3, momentum=0.9)
    if saved_with_graphs:
        make_capturable(saved, on_load=lambda: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    make_capturable(optimizer, on_load=lambda: forgotten.append(True))
    rate = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.3)
    assert optimizer.param_groups[0]["fused"] is True
    assert forgotten == [True]


def test_a_count_on_the_host_is_refused() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    with pytest.raises(UsageError, match=r"Adam changes step on the host.*\+opt=fused_optimizer"):
        replayable(run, optimizer)(lambda: step(model, optimizer))


def test_state_that_is_made_while_recording_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(UsageError, match="SGD changes momentum_buffer"):
        replayable(run, optimizer)(lambda: step(model, optimizer))


def test_a_step_that_only_changes_tensors_is_recorded() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    replayable(run, optimizer)(lambda: step(model, optimizer))
