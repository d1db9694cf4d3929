"""The opt `grad_accumulation`: a large batch on a device that holds only a part of it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.types import Evidence, OptSpec, Plugin, RunContext, StepParts

if TYPE_CHECKING:
    from timetrial_grad_accumulation.accumulation import Accumulation


@dataclass(kw_only=True)
class GradAccumulationConfig:
    """Settings of `opt.grad_accumulation`."""

    steps: int = checked(at_least=1)
    """Micro-batches in a step, named as in the closed rules' log."""


class GradAccumulation(Plugin):
    """Splits each batch into micro-batches and accumulates their gradients."""

    spec = OptSpec(
        interface=2,
        summary="a step in several micro-batches, for batches that do not fit into memory",
        numerics="tolerance",
    )
    Config = GradAccumulationConfig
    config: GradAccumulationConfig

    _accumulation: Accumulation | None = None

    @hookimpl(wrapper=True)
    def build_step(self, ctx: RunContext) -> Generator[None, StepParts, StepParts]:
        from timetrial_grad_accumulation.accumulation import Accumulation

        parts = yield
        steps = self.config.steps
        self._accumulation = Accumulation(parts.forward_backward, ctx.distributed_model, steps, ctx.data_size)
        return replace(parts, forward_backward=self._accumulation, micro_batches=steps * parts.micro_batches)

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        import torch

        seen = self._accumulation.seen if self._accumulation else dict[int, int]()
        counts = ", ".join(f"{steps} steps of {number} micro-batches" for number, steps in sorted(seen.items()))
        exchanged = "; gradients exchanged once a step" if self._accumulation and self._accumulation.exchanges else ""
        drops = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in ctx.model.modules())
        active = any(number > 1 for number in seen)
        return Evidence(
            plugin="grad_accumulation",
            active=active,
            summary=(counts or "no step has run yet") + exchanged,
            figures={"steps_by_micro_batches": {str(k): v for k, v in sorted(seen.items())}},
            # An accelerator draws other dropout masks for two micro-batches than for one batch.
            numerics="changes" if active and (drops or ctx.workload.spec.batch_statistics) else None,
        )
