"""torch.compile as an opt. The backend of torch.compile is `eager` here: what is counted does not depend on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
from torch import Tensor, nn

from core.api.config import validate
from core.api.errors import ConflictError, UsageError
from core.api.hooks import PROJECT, Hooks, hookimpl
from timetrial_compile.plugin import Compile, CompileConfig

CTX: Any = SimpleNamespace()


class Baseline:
    @hookimpl
    def prepare_model(self, model: Any) -> Any:
        return model


class Breaking(nn.Module):
    """A model that torch.compile has to split in two."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        torch._dynamo.graph_break()
        return y.relu()


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


def configured(**settings: Any) -> Compile:
    given = {"backend": "eager", "mode": "default", "dynamic": None, "fullgraph": False, **settings}
    return Compile(CompileConfig(**given))


def prepared(model: nn.Module, **settings: Any) -> tuple[Compile, Any]:
    manager, plugin = pluggy.PluginManager(PROJECT), configured(**settings)
    manager.add_hookspecs(Hooks)
    manager.register(Baseline())
    manager.register(plugin)
    return plugin, manager.hook.prepare_model(ctx=CTX, model=model)


def test_it_compiles_in_place_and_parameters_keep_their_names() -> None:
    model = Breaking()
    _, compiled = prepared(model)
    assert compiled is model
    assert list(compiled.state_dict()) == ["layer.weight", "layer.bias"]


def test_a_model_of_a_class_of_torch_is_compiled_too() -> None:
    plugin, model = prepared(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert not plugin.verify().active
    model(torch.randn(2, 4)).sum().backward()
    evidence = plugin.verify()
    assert evidence.active
    assert evidence.figures["graphs"] == 1
    assert evidence.figures["graph_breaks"] == {}


def test_graph_breaks_are_reported_with_their_reason() -> None:
    plugin, model = prepared(Breaking())
    model(torch.randn(2, 4))
    figures = plugin.verify().figures
    assert figures["graphs"] == 2
    assert sum(figures["graph_breaks"].values()) >= 1
    assert any("graph_break" in reason for reason in figures["graph_breaks"])


def test_fullgraph_refuses_a_model_that_breaks() -> None:
    _, model = prepared(Breaking(), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(torch.randn(2, 4))


def test_a_batch_of_another_size_is_counted_as_a_recompilation() -> None:
    plugin, model = prepared(nn.Sequential(nn.Linear(4, 4)))
    model(torch.randn(8, 4))
    model(torch.randn(5, 4))
    figures = plugin.verify().figures
    assert figures["graphs"] == 2
    assert len(figures["recompilations"]) == 1
    assert "size mismatch" in figures["recompilations"][0]


@pytest.mark.parametrize(
    ("backend", "p", "numerics"), [("inductor", 0.1, "changes"), ("inductor", 0.0, None), ("eager", 0.1, None)]
)
def test_generated_kernels_change_the_numbers_of_a_model_with_dropout(
    backend: str, p: float, numerics: str | None
) -> None:
    plugin, _ = prepared(nn.Sequential(nn.Linear(4, 4), nn.Dropout(p)), backend=backend)
    assert plugin.verify().numerics == numerics


def test_what_others_compiled_before_is_not_counted() -> None:
    _, other = prepared(nn.Sequential(nn.Linear(4, 4)))
    other(torch.randn(8, 4))
    plugin, _ = prepared(nn.Sequential(nn.Linear(4, 4)))
    assert not plugin.verify().active


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_mode_that_captures_graphs_conflicts_with_cuda_graphs(mode: str) -> None:
    plan: Any = SimpleNamespace(opts=("compile", "cuda_graphs"))
    with pytest.raises(ConflictError, match=f"opt.compile.mode={mode} captures CUDA graphs"):
        configured(mode=mode).check(plan)
    configured(mode=mode).check(SimpleNamespace(opts=("compile",)))  # pyright: ignore[reportArgumentType]
    for other in ("default", "max-autotune-no-cudagraphs"):
        configured(mode=other).check(plan)


def test_an_unknown_mode_is_refused() -> None:
    settings = {"backend": "inductor", "mode": "max_autotune", "dynamic": None, "fullgraph": False}
    with pytest.raises(UsageError, match="did you mean 'max-autotune'"):
        validate(CompileConfig, settings, "opt.compile")
