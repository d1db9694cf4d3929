"""bfloat16 autocast on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.api.config import validate
from core.api.errors import UsageError
from core.api.seams import INFER, LOSS, Seam
from timetrial_amp.autocast import observe
from timetrial_amp.plugin import Amp, AmpConfig

CTX: Any = SimpleNamespace(device=torch.device("cpu"))


def composed(seam: Seam[Any], function: Any) -> tuple[Amp, Any]:
    """The opt, and what it makes of `function` at `seam`."""
    amp = Amp(AmpConfig(dtype="bfloat16"))
    (replacement,) = (r for r in amp.replace(CTX) if r.seam == seam)
    return amp, replacement.make(function)


def loss(model: nn.Module, data: Tensor) -> dict[str, Tensor]:
    return {"loss": model(data).square().mean()}


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_every_product_and_convolution_runs_in_bfloat16_and_the_weights_stay_float32() -> None:
    amp, run = composed(LOSS, loss)
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

    _, run = composed(LOSS, lambda model, data: {"loss": Note.apply(model(data)).square().mean()})
    run(nn.Linear(4, 4), torch.randn(2, 4))["loss"].backward()
    assert inside == {"forward": True, "backward": False}


def test_inference_runs_in_bfloat16_and_hands_back_float32() -> None:
    seen: list[torch.dtype] = []

    def infer(model: nn.Module, data: Tensor) -> dict[str, Tensor]:
        result = model(data)
        seen.append(result.dtype)
        return {"scores": result, "best": result.argmax(1)}

    _, run = composed(INFER, infer)
    results = run(nn.Linear(4, 4), torch.randn(2, 4))
    assert seen == [torch.bfloat16]
    assert (results["scores"].dtype, results["best"].dtype) == (torch.float32, torch.int64)


def test_it_acts_on_the_seams_that_its_spec_names() -> None:
    replacements = Amp(AmpConfig(dtype="bfloat16")).replace(CTX)
    assert {replacement.seam for replacement in replacements} == Amp.spec.replaces


def test_the_graph_is_looked_at_once() -> None:
    amp, run = composed(LOSS, loss)
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
