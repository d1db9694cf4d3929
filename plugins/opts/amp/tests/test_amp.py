"""bfloat16 autocast on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
from torch import Tensor, nn

from core.api.config import validate
from core.api.errors import UsageError
from core.api.hooks import PROJECT, Hooks, hookimpl
from timetrial_amp.autocast import observe
from timetrial_amp.plugin import Amp, AmpConfig

CTX: Any = SimpleNamespace(device=torch.device("cpu"))


class Baseline:
    @hookimpl
    def component(self, default: Any) -> Any:
        return default


def composed(name: str, function: Any) -> tuple[Amp, Any]:
    manager, amp = pluggy.PluginManager(PROJECT), Amp(AmpConfig(dtype="bfloat16"))
    manager.add_hookspecs(Hooks)
    manager.register(Baseline())
    manager.register(amp)
    return amp, manager.hook.component(ctx=CTX, name=name, default=function)


def loss(model: nn.Module, data: Tensor) -> dict[str, Tensor]:
    return {"loss": model(data).square().mean()}


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_every_product_and_convolution_runs_in_bfloat16_and_the_weights_stay_float32() -> None:
    amp, run = composed("loss", loss)
    model = small_network()
    outputs = run(model, torch.randn(2, 3, 8, 8))
    outputs["loss"].backward()
    evidence = amp.verify(CTX)
    assert evidence.active
    assert evidence.summary.startswith("2 of 2 matrix products and convolutions gave bfloat16")
    assert outputs["loss"].dtype == torch.float32
    assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_the_backward_pass_runs_outside_autocast() -> None:
    inside: dict[str, bool] = {}

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            inside["forward"] = torch.is_autocast_enabled("cpu")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            inside["backward"] = torch.is_autocast_enabled("cpu")
            return grad

    _, run = composed("loss", lambda model, data: {"loss": Note.apply(model(data)).square().mean()})
    run(nn.Linear(4, 4), torch.randn(2, 4))["loss"].backward()
    assert inside == {"forward": True, "backward": False}


def test_inference_runs_in_bfloat16_and_hands_back_float32() -> None:
    seen: list[torch.dtype] = []

    def infer(model: nn.Module, data: Tensor) -> dict[str, Tensor]:
        result = model(data)
        seen.append(result.dtype)
        return {"scores": result, "best": result.argmax(1)}

    _, run = composed("infer", infer)
    results = run(nn.Linear(4, 4), torch.randn(2, 4))
    assert seen == [torch.bfloat16]
    assert (results["scores"].dtype, results["best"].dtype) == (torch.float32, torch.int64)


def test_other_components_are_left_alone() -> None:
    _, run = composed("rnnt.loss", loss)
    assert run is loss


def test_the_graph_is_looked_at_once() -> None:
    amp, run = composed("loss", loss)
    model = small_network()
    run(model, torch.randn(2, 3, 8, 8))
    first = amp._loss.observed
    run(model, torch.randn(2, 3, 8, 8))
    assert amp._loss.observed is first


def test_a_float32_step_is_no_evidence() -> None:
    seen = observe(loss(small_network(), torch.randn(2, 3, 8, 8))["loss"], torch.bfloat16)
    assert (seen.eager, seen.eager_low, seen.active) == (2, 0, False)
    assert not Amp(AmpConfig(dtype="bfloat16")).verify(CTX).active


def test_float16_is_refused() -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        validate(AmpConfig, {"dtype": "float16"}, "opt.amp")
