"""The opt `async_eval`: evaluation in a process of its own, while training goes on."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.errors import PluginError
from core.api.hooks import hookimpl
from core.api.types import Evidence, OptSpec, Plugin, RunContext

if TYPE_CHECKING:
    from timetrial_async_eval.pending import Evaluations


@dataclass(kw_only=True)
class AsyncEvalConfig:
    """Settings of `opt.async_eval`."""

    device: str = checked(choices=("rank", "cpu"))
    """Where it computes: on rank 0's device, or on the CPU."""
    threads: int | None = checked(at_least=1)
    """Its CPU threads; None for as many as rank 0 has."""


class AsyncEval(Plugin):
    """Hands each evaluation's weights to a process beside rank 0 and lets the loop go on."""

    spec = OptSpec(
        interface=1,
        summary="evaluation in a process of its own while training goes on",
        numerics="bitwise",
        components=frozenset({"evaluate"}),
    )
    Config = AsyncEvalConfig
    config: AsyncEvalConfig

    _evaluations: Evaluations | None = None

    @hookimpl(wrapper=True)
    def component(self, ctx: RunContext, name: str) -> Generator[None, Any, Any]:
        inner = yield
        if name != "evaluate":
            return inner
        if ctx.synthetic:
            raise PluginError("opt 'async_eval' does not apply to synthetic data, which is not evaluated; leave it out")
        from timetrial_async_eval.pending import Evaluations

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
