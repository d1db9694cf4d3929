"""The opt `amp`: automatic mixed precision in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.seams import INFER, LOSS, Replacement
from core.api.types import Evidence, OptSpec, Outputs, Plugin, RunContext

if TYPE_CHECKING:
    from torch import nn

    from timetrial_amp.autocast import AutocastLoss


@dataclass(kw_only=True)
class AmpConfig:
    """Settings of `opt.amp`."""

    dtype: str = checked(choices=("bfloat16",))
    """The 16-bit format; float16 would need loss scaling, which is not offered."""


class Amp(Plugin):
    """Runs the forward passes of training and of evaluation under bfloat16 autocast."""

    spec = OptSpec(
        interface=2,
        summary="bfloat16 autocast: matrix products and convolutions in 16 bits",
        numerics="changes",
        replaces=frozenset({LOSS, INFER}),
    )
    Config = AmpConfig
    config: AmpConfig

    _loss: AutocastLoss | None = None

    @hookimpl
    def replace(self, ctx: RunContext) -> list[Replacement[Any]]:
        import torch

        from timetrial_amp.autocast import AutocastLoss, autocast

        dtype = getattr(torch, self.config.dtype)

        def infer_in_16_bits(infer: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
            return autocast(infer, ctx.device.type, dtype)

        def loss_in_16_bits(loss: Callable[[nn.Module, Any], Outputs]) -> AutocastLoss:
            self._loss = AutocastLoss(loss, ctx.device.type, dtype)
            return self._loss

        return [LOSS.by(loss_in_16_bits), INFER.by(infer_in_16_bits)]

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        from timetrial_amp.autocast import native_bfloat16

        seen = self._loss.observed if self._loss else None
        if seen is None:
            return Evidence(plugin="amp", active=False, summary="no training step has run yet")
        parts: list[str] = []
        if seen.eager:
            parts.append(f"{seen.eager_low} of {seen.eager} matrix products and convolutions gave {self.config.dtype}")
        if seen.compiled:
            parts.append(f"compiled graphs kept {seen.compiled_low} of {seen.compiled} tensors in {self.config.dtype}")
        native = native_bfloat16(ctx.device)
        parts = parts or ["the step has no matrix product or convolution"]
        parts.append(f"the {ctx.device.type} {'has' if native else 'lacks'} native bfloat16 arithmetic")
        return Evidence(
            plugin="amp", active=seen.active, summary="; ".join(parts), figures={**asdict(seen), "native": native}
        )
