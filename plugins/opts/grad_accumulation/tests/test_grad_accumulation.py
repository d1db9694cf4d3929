"""Micro-batches must add up to the batch."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from core.api.errors import NotOfferedError
from core.api.hooks import PROJECT, Hooks, hookimpl
from core.api.types import Batch, Outputs, StepParts
from timetrial_grad_accumulation.accumulation import Accumulation, combine, split
from timetrial_grad_accumulation.plugin import GradAccumulation, GradAccumulationConfig

pytestmark = pytest.mark.numbers


def forward_backward(model: nn.Module) -> Any:
    """As core's own: the loss it returns carries the batch's weight."""

    def run(batch: Batch) -> Outputs:
        logits_NC, y_N = model(batch.data["x"]), batch.data["y"]
        loss = nn.functional.cross_entropy(logits_NC, y_N) * batch.weight
        loss.backward()
        return {"loss": loss.detach(), "correct": (logits_NC.argmax(1) == y_N).sum()}

    return run


def batch_of(size: int, samples: int | None = None, weight: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(size)
    x_NF, y_N = (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
    return Batch({"x": x_NF, "y": y_N}, samples=samples or size, weight=weight)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 33), steps=st.integers(1, 9), weight=st.sampled_from([1.0, 0.75, 4 / 3]))
def test_the_gradient_is_that_of_the_whole_batch(size: int, steps: int, weight: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    batch = batch_of(size, weight=weight)
    whole = forward_backward(model)(batch)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    outputs = Accumulation(forward_backward(model), model, steps, 1)(batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs["loss"], whole["loss"], rtol=0, atol=1e-6)
    assert outputs["correct"] == whole["correct"]


def test_chunks_differ_by_at_most_one_example_and_lose_nothing() -> None:
    batch = batch_of(10, samples=20, weight=1.5)
    parts = split(batch, 4, 2)
    assert [len(p.data["y"]) for p in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat([p.data["x"] for p in parts]), batch.data["x"])
    assert sum(p.samples for p in parts) == 20
    assert sum(p.weight for p in parts) == pytest.approx(1.5)


def test_ranks_with_unequal_shares_make_equally_many_micro_batches() -> None:
    """Global batch of 5 over 2 ranks: shares of 3 and 2 examples."""
    assert [len(split(batch_of(size, samples=5), 4, 2)) for size in (3, 2)] == [2, 2]


def test_data_without_a_batch_dimension_goes_to_every_micro_batch() -> None:
    data = {"x": torch.zeros(4, 2), "temperature": torch.tensor(0.5), "kind": "train"}
    parts = split(Batch(data, samples=4), 2, 1)
    assert [(p.data["temperature"].item(), p.data["kind"]) for p in parts] == [(0.5, "train")] * 2


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(NotOfferedError, match=r"cannot split this workload's batches: .* 4, 7 elements"):
        split(Batch({"packed": torch.zeros(7), "starts": torch.zeros(4)}, samples=4), 2, 1)


def test_outputs_are_combined_by_what_they_are() -> None:
    parts = [
        {"loss": torch.tensor(0.75), "accuracy": torch.tensor(1.0), "each": torch.tensor([1.0, 2.0, 3.0])},
        {"loss": torch.tensor(0.25), "accuracy": torch.tensor(0.0), "each": torch.tensor([4.0])},
    ]
    outputs = combine(parts, [0.75, 0.25])
    assert (outputs["loss"].item(), outputs["accuracy"].item()) == (1.0, 0.75)
    assert outputs["each"].tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_gradients_are_exchanged_once_a_step() -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(6, 3))
    exchanges = 0

    def count(state, bucket):  # torch refuses annotations that are strings
        nonlocal exchanges
        exchanges += 1
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, count)
    wrapped = nn.Sequential(model)  # as an opt outside of it would
    accumulate = Accumulation(forward_backward(wrapped), wrapped, 4, 1)
    accumulate(batch_of(8))
    assert exchanges == 1
    accumulate(batch_of(8))
    assert exchanges == 2
    assert accumulate.seen == {4: 2}


class Baseline:
    @hookimpl
    def build_step(self, parts: StepParts) -> StepParts:
        return parts


@pytest.mark.parametrize(
    ("batch_statistics", "dropout", "numerics"), [(True, 0.0, "changes"), (False, 0.5, "changes"), (False, 0.0, None)]
)
def test_evidence_counts_micro_batches_and_names_the_change(
    batch_statistics: bool, dropout: float, numerics: str | None
) -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(dropout))
    workload = SimpleNamespace(spec=SimpleNamespace(batch_statistics=batch_statistics))
    ctx: Any = SimpleNamespace(model=model, distributed_model=model, data_size=1, workload=workload)
    manager, plugin = (pluggy.PluginManager(PROJECT), GradAccumulation(GradAccumulationConfig(steps=4)))
    manager.add_hookspecs(Hooks)
    manager.register(Baseline())
    manager.register(plugin)
    parts = manager.hook.build_step(ctx=ctx, parts=StepParts(forward_backward(model), lambda: None))
    assert not plugin.verify(ctx).active
    parts.forward_backward(batch_of(8))
    parts.forward_backward(batch_of(3))
    evidence = plugin.verify(ctx)
    assert evidence.active
    assert evidence.figures == {"steps_by_micro_batches": {"3": 1, "4": 1}}
    assert evidence.numerics == numerics
    assert parts.micro_batches == 4
