"""Recording and replaying, with a recorder that needs no CUDA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.api.errors import UsageError
from core.api.types import Batch
from timetrial_cuda_graphs.cuda import refusing
from timetrial_cuda_graphs.graphed import Graphed
from timetrial_cuda_graphs.optimizer import make_capturable, replayable


class Recorder:
    """A `Capture` for functions without side effects."""

    def __init__(self) -> None:
        self.recordings = 0

    def __call__(self, function: Any) -> Any:
        self.recordings += 1
        result = function()

        def replay() -> None:
            for old, new in zip(result.values(), function().values(), strict=True):
                old.copy_(new)

        return replay, result


def double(batch: Batch) -> dict[str, Tensor]:
    return {"loss": batch.data["x"].sum() * 2 * batch.weight}


def batch(*values: float, samples: int = 4, weight: float = 1.0) -> Batch:
    return Batch({"x": torch.tensor(values)}, samples, weight)


def graphed(**settings: Any) -> Graphed:
    return Graphed(double, Recorder(), **{"eager_calls": 2, "max_graphs": 2, **settings})


def test_warm_up_is_eager_and_the_next_step_of_a_known_shape_is_a_replay() -> None:
    step = graphed()
    results = [step(batch(float(i), 1.0))["loss"].item() for i in range(5)]
    assert results == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert (step.seen.captured, step.seen.replays, dict(step.seen.eager)) == (1, 3, {"warm-up": 2})


def test_the_first_step_of_a_new_shape_is_eager() -> None:
    step = graphed(eager_calls=1)
    for size in (2, 2, 3, 3, 3):
        step(batch(*[1.0] * size))
    assert dict(step.seen.eager) == {"warm-up": 1, "first of its shape": 1}
    assert (step.seen.captured, step.seen.replays) == (2, 3)


def test_a_result_is_not_overwritten_by_the_next_replay() -> None:
    step = graphed(eager_calls=1)
    losses = [step(batch(float(i)))["loss"] for i in range(4)]
    assert [loss.item() for loss in losses] == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    "other",
    [
        batch(1.0, samples=3),
        batch(1.0, weight=0.5),
        batch(1.0, 2.0),
        Batch({"x": torch.ones(1, dtype=torch.float64)}, 4),
        Batch({"x": torch.ones(1), "y": torch.ones(1)}, 4),
        Batch({"x": torch.ones(1), "flag": True}, 4),
    ],
    ids=["samples", "weight", "shape", "dtype", "structure", "plain data"],
)
def test_whatever_a_recording_takes_as_fixed_tells_batches_apart(other: Batch) -> None:
    step = graphed(eager_calls=1)
    for _ in range(3):
        step(batch(1.0))
    replays = step.seen.replays
    assert step(other)["loss"].item() == double(other)["loss"].item()
    assert step.seen.replays == replays


def test_the_model_s_mode_tells_inference_steps_apart() -> None:
    model = SimpleNamespace(training=False)
    step = graphed(eager_calls=1, mode=lambda: model.training)
    for _ in range(3):
        step(batch(1.0))
    model.training = True
    step(batch(1.0))
    assert step.seen.eager["first of its shape"] == 1


def test_the_least_recently_used_graph_makes_room() -> None:
    step = graphed(eager_calls=1)
    sizes = [1, 1, 2, 2, 1, 3, 3]  # the third one pushes out 2, which was used before 1
    for size in [*sizes, 1, 2]:
        step(batch(*[1.0] * size))
    assert step.seen.dropped == 2  # 2 for 3, then 3 for 2
    assert step.seen.captured == 4
    assert len(step._graphs) == 2


def test_shapes_that_never_return_are_never_captured() -> None:
    step = graphed(eager_calls=1)
    for size in range(1, 20):
        step(batch(*[1.0] * size))
    assert (step.seen.captured, step.seen.eager["first of its shape"]) == (0, 18)


class Ranks:
    """What the other rank says at each question."""

    def __init__(self, *others: float) -> None:
        self.others, self.asked = list(others), list[float]()

    def __call__(self, number: float) -> list[float]:
        self.asked.append(number)
        return [number, self.others.pop(0)]


def test_ranks_with_static_shapes_ask_each_other_once() -> None:
    ranks = Ranks(1.0)
    step = graphed(gather=ranks, static_shapes=True)
    for _ in range(6):
        step(batch(1.0))
    assert (ranks.asked, step.seen.replays) == ([1.0], 4)


def test_many_shapes_on_another_rank_make_them_ask_before_each_step() -> None:
    ranks = Ranks(9.0, -1.0, 0.0)
    step = graphed(gather=ranks, static_shapes=True)
    for _ in range(4):
        step(batch(1.0))
    assert ranks.asked == [1.0, -1.0, 0.0]


def test_a_rank_that_would_replay_alone_runs_eagerly() -> None:
    ranks = Ranks(1.0, -1.0, -2.0, 0.0)
    step = graphed(gather=ranks, static_shapes=False)
    for _ in range(5):
        step(batch(1.0))
    assert dict(step.seen.eager) == {"warm-up": 2, "shapes differ between ranks": 1}
    assert (step.seen.captured, step.seen.replays) == (1, 2)


def test_what_cannot_be_recorded_is_refused_in_one_line() -> None:
    def fails(function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    step = graphed(eager_calls=1)
    step.capture = refusing(fails, "the training step", "leave out 'cuda_graphs'")
    step(batch(1.0))
    with pytest.raises(
        UsageError, match=r"the training step cannot be captured \(RuntimeError: operation not .*\); lea"
    ):
        step(batch(1.0))


def test_a_result_that_cannot_be_copied_out_is_refused() -> None:
    step = graphed(eager_calls=1)
    step.step = lambda batch: {"loss": SimpleNamespace(tensor=batch.data["x"])}
    step(batch(1.0))
    with pytest.raises(UsageError, match="cannot copy a SimpleNamespace out of a graph"):
        step(batch(1.0))


# ------------------------------------------------------------------------------------------------ whole training steps


def train(tape: Any, restore_at: int | None) -> tuple[list[float], list[Tensor], Graphed | None]:
    """30 steps of a network with dropout, through `tape` or bare; every tenth batch is smaller."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    chosen = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step: Any = None
    make_capturable(chosen, on_load=lambda: step.forget() if tape else None)

    def whole(batch: Batch) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(model(batch.data[0]), batch.data[1])
        loss.backward()
        chosen.step()
        chosen.zero_grad()
        return {"loss": loss.detach()}

    step = Graphed(whole, replayable(tape, chosen), eager_calls=11, max_graphs=4) if tape else whole
    data = torch.Generator().manual_seed(1)
    losses: list[float] = []
    for number in range(30):
        size = 5 if number % 10 == 9 else 8
        points = torch.randn(size, 6, generator=data)
        labels = torch.randint(3, (size,), generator=data)
        for group in chosen.param_groups:
            group["lr"].fill_(0.1 / (1 + number))
        losses.append(step(Batch((points, labels), size))["loss"].item())
        if number == restore_at:
            chosen.load_state_dict(chosen.state_dict())
    return losses, list(model.parameters()), step if tape else None


@pytest.mark.parametrize("restore_at", [None, 20])
def test_replayed_training_has_the_bits_of_eager_training(tape: Any, restore_at: int | None) -> None:
    eager_losses, eager_parameters, _ = train(None, restore_at)
    losses, parameters, step = train(tape, restore_at)
    assert step is not None
    assert step.seen.replays > 10
    assert losses == eager_losses
    assert all(torch.equal(a, b) for a, b in zip(parameters, eager_parameters, strict=True))
