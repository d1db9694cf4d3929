"""`count_flops` counts the floating-point operations of a step; `plain_hook` makes DDP's exchange a Python hook."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from core.api.hooks import hookimpl
from core.api.seams import GRADIENT_EXCHANGE, Replacement
from core.api.types import Batch, Evidence, OptSpec, Outputs, Plugin, RunContext, StepParts


@dataclass(kw_only=True)
class NoSettings:
    """It has no settings."""


class CountFlops(Plugin):
    """Counts the operations of the first forward and backward pass: matrix products, convolutions, attention."""

    spec = OptSpec(interface=2, summary="counts the operations of a step", numerics="bitwise")
    Config = NoSettings

    flops, samples = 0, 0

    @hookimpl(wrapper=True)
    def build_step(self, ctx: RunContext) -> Generator[None, StepParts, StepParts]:
        from torch.utils.flop_counter import FlopCounterMode

        parts = yield

        def counted(batch: Batch) -> Outputs:
            if self.flops:
                return parts.forward_backward(batch)
            with FlopCounterMode(display=False) as counter:
                outputs = parts.forward_backward(batch)
            self.flops, self.samples = counter.get_total_flops(), batch.samples // ctx.data_size
            return outputs

        return replace(parts, forward_backward=counted)

    @hookimpl
    def verify(self) -> Evidence:
        per_sample = self.flops / self.samples if self.samples else 0.0
        words = f"{per_sample / 1e9:.3g} GFLOP a sample, forward and backward"
        return Evidence(
            plugin="count_flops", active=self.flops > 0, summary=words, figures={"flops_per_sample": per_sample}
        )


class PlainHook(Plugin):
    """torch's own all-reduce as a communication hook: it must change nothing."""

    spec = OptSpec(
        interface=2,
        summary="DDP's exchange as a hook",
        numerics="bitwise",
        claims=frozenset({"gradient_exchange.hook"}),
        replaces=frozenset({GRADIENT_EXCHANGE}),
    )
    Config = NoSettings

    buckets = 0

    @hookimpl
    def replace(self) -> list[Replacement[Any]]:
        return [GRADIENT_EXCHANGE.by(self._counted)]

    def _counted(self, inner: Any) -> tuple[Any, Any]:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def counted(state, bucket):  # torch refuses annotations that are strings
            self.buckets += 1
            return allreduce_hook(state, bucket)

        return None, counted

    @hookimpl
    def verify(self) -> Evidence:
        words = f"{self.buckets} buckets went through the hook, eagerly or while a graph was captured"
        return Evidence(plugin="plain_hook", active=self.buckets > 0, summary=words)
