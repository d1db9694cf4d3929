"""Updates in the backward pass must be the updates that would have come after it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.api.types import StepParts
from timetrial_stream_overlap.updates import BackwardUpdates, average, buckets, obstacle

pytestmark = pytest.mark.numbers

CPU = torch.device("cpu")
STEPS = 4
SMALL_BUCKET = 300
"""Bytes: a few parameters of the network below."""

Make = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as some foreign optimizers do, and lets the count decide."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-0.1 / group["step"])


def counting(model: nn.Module) -> torch.optim.Optimizer:
    return Counting(model.parameters(), lr=0.1)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )
    return model.to(memory_format=torch.channels_last)  # gradients then lie otherwise in their bucket, too


def batch(step: int) -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def trained(model: nn.Module, module: nn.Module, optimizer: torch.optim.Optimizer, finish: Callable[[], None]) -> None:
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        module(batch(step)).square().mean().backward()
        finish()


def baseline(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = make(model)

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad()

    trained(model, model, optimizer, finish)
    return model, optimizer


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distributed(model: nn.Module, updates: BackwardUpdates, hook: Any = average) -> DistributedDataParallel:
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKET / 2**20, gradient_as_bucket_view=True)
    ddp.register_comm_hook(ddp.process_group, updates.after(hook))
    return ddp


def elsewhere(group, bucket):  # torch refuses annotations that are strings
    """A hook whose result is not the bucket's own memory."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer().clone())
    bucket.buffer().fill_(float("nan"))
    return future


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("hook", [average, elsewhere])
@pytest.mark.parametrize("make", [sgd, adamw, counting])
def test_behind_the_exchange_of_each_bucket_they_have_the_bits_of_the_baseline(make: Make, hook: Any) -> None:
    model, updates = network(), BackwardUpdates(CPU)
    ddp = distributed(model, updates, hook)
    optimizer = make(model)
    updates.bind(optimizer)
    updates.armed = True
    trained(model, ddp, optimizer, updates.finish)
    reference, _ = baseline(make)
    assert_same_bits(model, reference)
    assert updates.buckets > STEPS
    assert (updates.steps, updates.late) == (STEPS, 0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [sgd, adamw, counting])
def test_without_ddp_they_have_the_bits_of_the_baseline_and_its_state(make: Make) -> None:
    model, updates = network(), BackwardUpdates(CPU)
    optimizer = make(model)
    updates.bind(optimizer)
    updates.watch(SMALL_BUCKET)
    updates.armed = True
    trained(model, model, optimizer, updates.finish)
    reference, other = baseline(make)
    assert_same_bits(model, reference)
    mine, theirs = optimizer.state_dict(), other.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(mine["state"], theirs["state"], rtol=0, atol=0)


def test_before_it_is_armed_a_backward_pass_changes_nothing() -> None:
    model, updates = network(), BackwardUpdates(CPU)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = sgd(model)
    updates.bind(optimizer)
    updates.watch(SMALL_BUCKET)
    model(batch(0)).square().mean().backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not optimizer.state


def test_state_that_a_checkpoint_puts_in_place_is_used() -> None:
    saved_model, saved = baseline(sgd)
    model, updates = network(), BackwardUpdates(CPU)
    optimizer = sgd(model)
    updates.bind(optimizer)
    updates.watch(SMALL_BUCKET)
    model.load_state_dict(saved_model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    updates.armed = True
    for m, finish in ((model, updates.finish), (saved_model, lambda: (saved.step(), saved.zero_grad()))):
        m(batch(99)).square().mean().backward()
        finish()
    assert_same_bits(model, saved_model)


def test_a_parameter_that_only_some_steps_use_is_updated_in_those() -> None:
    def run(watching: bool) -> tuple[nn.Module, BackwardUpdates]:
        torch.manual_seed(1)
        model, updates = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), BackwardUpdates(CPU)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if watching:
            updates.bind(optimizer)
            updates.watch(10_000)  # all in one bucket
            updates.armed = True
        for step in range(6):
            x = torch.ones(2, 4)
            for number, layer in enumerate(model):
                x = x if number == step % 3 else layer(x)
            x.square().mean().backward()
            updates.finish() if watching else (optimizer.step(), optimizer.zero_grad())
        return model, updates

    (model, updates), (reference, _) = run(True), run(False)
    assert_same_bits(model, reference)
    assert updates.late == 6 * 4


@pytest.mark.usefixtures("process_group")
def test_with_accumulated_gradients_only_the_last_backward_pass_updates() -> None:
    model, updates = network(), BackwardUpdates(CPU)
    ddp = distributed(model, updates)
    optimizer = sgd(model)
    updates.bind(optimizer)
    updates.armed = True
    reference = network()
    other = sgd(reference)
    for step in range(2):
        with ddp.no_sync():
            ddp(batch(10 + step)).square().mean().backward()
        assert updates.steps == step and not updates._done
        ddp(batch(20 + step)).square().mean().backward()
        updates.finish()
        for number in (10 + step, 20 + step):
            reference(batch(number)).square().mean().backward()
        other.step()
        other.zero_grad()
    assert_same_bits(model, reference)


@pytest.mark.usefixtures("process_group")
def test_an_error_in_an_update_stops_the_step() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ArithmeticError("no such root")

    model, updates = network(), BackwardUpdates(CPU)
    ddp = distributed(model, updates)
    updates.bind(Broken(model.parameters(), lr=0.1))
    updates.armed = True
    with pytest.raises(RuntimeError, match="no such root"):
        ddp(batch(0)).square().mean().backward()


def test_optimizers_that_need_all_gradients_are_told_apart() -> None:
    model = network()
    parts = StepParts(lambda batch: {}, lambda: None)
    assert obstacle(sgd(model), parts, parts) is None
    clipping = sgd(model)
    clipping.param_groups[0]["max_grad_norm"] = None
    assert obstacle(clipping, parts, parts) is None
    clipping.param_groups[1]["max_grad_norm"] = 1.0
    assert "max_grad_norm=1" in (obstacle(clipping, parts, parts) or "")
    assert "LBFGS" in (obstacle(torch.optim.LBFGS(model.parameters()), parts, parts) or "")
    hooked = sgd(model)
    hooked.register_step_post_hook(lambda *_: None)
    assert "as a whole" in (obstacle(hooked, parts, parts) or "")
    changed = StepParts(parts.forward_backward, lambda: None)
    assert "another opt" in (obstacle(sgd(model), parts, changed) or "")


def test_a_bucket_is_full_at_its_cap() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (10, 10, 30, 5)]  # 4 bytes each
    assert [[p.numel() for p in b] for b in buckets(parameters, 80)] == [[10, 10], [30], [5]]
    assert len(buckets(parameters, 10**9)) == 1
    assert buckets([], 80) == []
