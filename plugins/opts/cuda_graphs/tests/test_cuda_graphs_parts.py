"""Parts of a model as graphs, with a stand-in for torch.cuda.make_graphed_callables (`Pool` in tape.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.api.errors import OutOfMemoryError, UsageError
from timetrial_cuda_graphs.evidence import of_parts
from timetrial_cuda_graphs.parts import Part, graph_parts

CPU = torch.device("cpu")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.spare = nn.Linear(1, 1)

    def forward(self, x: Tensor, times: int = 1, kept: int | None = None) -> Tensor:
        """`kept` rows reach the head."""
        for _ in range(times):
            y = self.body(x)
        return self.head(y[:kept])


def graph(
    model: Network,
    pool: Any,
    *names: str,
    sizes: tuple[int, ...] = (8,),
    most: int = 16,
    kept: int | None = None,
    times: int = 1,
) -> dict[str, Part]:
    passes = (lambda size=size: model(torch.ones(size, 3), times, kept) for size in sizes)
    return graph_parts(model, names, passes, most, CPU, pool)


def test_parts_are_recorded_in_the_order_in_which_they_run(pool: Any) -> None:
    model = Network()
    assert list(graph(model, pool, "head", "body", sizes=(8, 6))) == ["body", "head"]
    assert pool.recordings == 2 * [(model.body, model.head)]


def test_recording_leaves_the_model_and_the_generator_as_they_were(pool: Any) -> None:
    model = Network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    graph(model, pool, "body", "head", sizes=(8, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


def test_each_shape_takes_its_graph_and_others_and_evaluation_the_forward_pass_as_written(pool: Any) -> None:
    model = Network()
    parts = graph(model, pool, "body", sizes=(8, 6))
    for size in (6, 8, 7, 6):  # copied into a buffer of 8, 7 rows would be stretched or refused
        model(torch.ones(size, 3)).sum().backward()
    model.eval()
    model(torch.ones(8, 3))
    assert pool.calls == 3
    evidence = of_parts(parts)
    assert evidence.active
    assert evidence.summary == (
        "parts of the model captured (body, 2 shapes): 3 replays, 1 eager calls of other shapes"
    )
    assert evidence.figures == {"body": {"replays": {"8x3": 1, "6x3": 2}, "eager_calls": {"7x3": 1}}}


def test_before_a_step_the_evidence_is_inactive(pool: Any) -> None:
    evidence = of_parts(graph(Network(), pool, "body"))
    assert not evidence.active
    assert evidence.figures == {"body": {"replays": {"8x3": 0}, "eager_calls": {}}}


def test_a_step_replays_the_graphs_of_one_shape_only(pool: Any) -> None:
    """The head has seen 5 rows before, but beside 8 in the body: that graph's memory is another's in this step."""
    model = Network()
    rows: dict[int, int | None] = {8: 5, 6: 4}
    passes = (lambda size=size: model(torch.ones(size, 3), kept=rows[size]) for size in rows)
    parts = graph_parts(model, ("body", "head"), passes, 16, CPU, pool)
    model(torch.ones(6, 3), kept=5).sum().backward()
    assert of_parts(parts).figures["head"] == {"replays": {"5x4": 0, "4x4": 0}, "eager_calls": {"5x4": 1}}
    model(torch.ones(8, 3), kept=5).sum().backward()
    assert of_parts(parts).figures["head"]["replays"] == {"5x4": 1, "4x4": 0}


def test_batches_that_the_first_part_cannot_tell_apart_share_a_graph(pool: Any) -> None:
    graph(Network(), pool, "body", "head", sizes=(8, 6, 8))
    assert len(pool.recordings) == 2


def test_the_first_shapes_that_differ_are_recorded_and_no_more(pool: Any) -> None:
    parts = graph(Network(), pool, "body", sizes=(8, 6, 8, 7, 5), most=3)
    assert list(of_parts(parts).figures["body"]["replays"]) == ["8x3", "6x3", "7x3"]
    assert len(pool.recordings) == 3


def test_what_needs_a_gradient_takes_no_graph_without_one(pool: Any) -> None:
    model = Network()
    parts = graph(model, pool, "body")
    x = torch.ones(8, 3, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert parts["body"].eager_calls.total() == 1


def test_parts_are_recorded_under_the_autocast_that_they_run_in(pool: Any) -> None:
    model = Network()

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.ones(8, 3))

    graph_parts(model, ("body",), [run], 16, CPU, pool)
    assert pool.autocast


def test_too_little_memory_for_all_shapes_names_the_setting(pool: Any) -> None:
    def full(*given: Any) -> None:
        if len(pool.recordings) == 6:
            raise torch.OutOfMemoryError
        pool(*given)

    with pytest.raises(OutOfMemoryError, match=r"has captured 6 shapes.*set opt.cuda_graphs.max_shapes=3"):
        graph(Network(), full, "body", sizes=tuple(range(2, 10)))


@pytest.mark.parametrize(
    ("names", "call", "message"),
    [
        (("neck",), {}, "no part 'neck'"),
        (("spare",), {}, "'spare' does not run"),
        (("body",), {"times": 2}, "'body' runs twice"),
    ],
)
def test_a_part_that_a_graph_cannot_stand_in_for_is_refused(pool: Any, names: Any, call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        graph(Network(), pool, *names, **call)
