"""Parts of a model as graphs, with a stand-in for torch.cuda.make_graphed_callables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import UsageError
from timetrial_cuda_graphs.evidence import of_parts
from timetrial_cuda_graphs.parts import Part, graph_parts

CPU = torch.device("cpu")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.spare = nn.Linear(1, 1)

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            y = self.body(x)
        return self.head(y)


class MakeGraphed:
    """Marks each graphed call, and disturbs what a real one disturbs: it runs the modules to warm up."""

    def __init__(self) -> None:
        self.modules: tuple[nn.Module, ...] = ()
        self.calls = 0
        self.autocast = False

    def __call__(self, modules: tuple[nn.Module, ...], arguments: tuple[tuple[Tensor, ...], ...]) -> None:
        self.modules, self.autocast = modules, torch.is_autocast_enabled("cpu")
        for module, args in zip(modules, arguments, strict=True):
            forward = module.forward
            forward(*args).sum().backward()

            def graphed(*args: Tensor, forward: Any = forward) -> Tensor:
                self.calls += 1
                return forward(*args)

            module.forward = graphed


def graph(model: Network, *names: str, size: int = 8, **call: Any) -> tuple[dict[str, Part], MakeGraphed]:
    make = MakeGraphed()
    x = torch.ones(size, 3)
    return graph_parts(model, names, lambda: model(x, **call), CPU, make), make


def test_parts_are_recorded_in_the_order_in_which_they_run() -> None:
    model = Network()
    parts, make = graph(model, "head", "body")
    assert list(parts) == ["body", "head"]
    assert make.modules == (model.body, model.head)


def test_recording_leaves_the_model_and_the_generator_as_they_were() -> None:
    model = Network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    graph(model, "body", "head")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


def test_other_shapes_and_evaluation_take_the_forward_pass_as_written() -> None:
    model = Network()
    parts, make = graph(model, "body")
    model(torch.ones(8, 3))
    model(torch.ones(7, 3))  # copied into a buffer of 8, it would be stretched or refused
    model.eval()
    model(torch.ones(8, 3))
    assert make.calls == 1
    assert (parts["body"].replays, parts["body"].eager_calls) == (1, 1)
    evidence = of_parts(parts)
    assert evidence.active
    assert evidence.summary == "1 parts of the model captured (body): 1 replays, 1 eager calls of another shape"


def test_parts_are_recorded_under_the_autocast_that_they_run_in() -> None:
    model, make = Network(), MakeGraphed()

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.ones(8, 3))

    graph_parts(model, ("body",), run, CPU, make)
    assert make.autocast


@pytest.mark.parametrize(
    ("names", "call", "message"),
    [
        (("neck",), {}, "no part 'neck'"),
        (("spare",), {}, "'spare' does not run"),
        (("body",), {"times": 2}, "'body' runs twice"),
    ],
)
def test_a_part_that_a_graph_cannot_stand_in_for_is_refused(names: Any, call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        graph(Network(), *names, **call)
