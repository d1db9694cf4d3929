"""The opt `async_eval`: evaluation in a separate process, while training goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.seams import EVALUATE, Replacement
from core.api.types import Evaluate, Evidence, OptSpec, Plugin, RunContext

if TYPE_CHECKING:
    from timetrial_async_eval.evaluations import Evaluations


@dataclass(kw_only=True)
class AsyncEvalConfig:
    """Settings of `opt.async_eval`."""

    device: str = checked(choices=("rank", "cpu"))
    """Where it computes: on rank 0's device, or on the CPU."""
    threads: int | None = checked(at_least=1)
    """Its CPU threads; None for as many as rank 0 has."""


class AsyncEval(Plugin):
    """Hands each evaluation's weights to a process beside rank 0 and lets the loop continue."""

    spec = OptSpec(
        interface=2,
        summary="evaluation in a separate process while training goes on",
        numerics="bitwise",
        replaces=frozenset({EVALUATE}),
    )
    Config = AsyncEvalConfig
    config: AsyncEvalConfig

    _evaluations: Evaluations | None = None

    @hookimpl
    def replace(self, ctx: RunContext) -> list[Replacement[Any]]:
        return [] if ctx.sidecar else [EVALUATE.by(lambda inner: self._beside(ctx))]

    def _beside(self, ctx: RunContext) -> Evaluate:
        from timetrial_async_eval.evaluations import Evaluations

        device = "cpu" if self.config.device == "cpu" else str(ctx.device)
        self._evaluations = Evaluations(ctx, device, self.config.threads)
        return self._evaluations.begin

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        assert self._evaluations is not None
        count, overlapped, took = self._evaluations.count, self._evaluations.overlapped_s, self._evaluations.took_s
        share = overlapped / took if took else 0.0
        return Evidence(
            plugin="async_eval",
            active=overlapped > 0,
            summary=f"{count} evaluations beside the training: {share:.0%} of their {took:.2f} s hidden behind steps",
            figures={
                "evaluations": count, "evaluation_s": took, "overlapped_s": overlapped,
                "snapshot_s": self._evaluations.snapshot_s,
            },
        )  # fmt: skip
