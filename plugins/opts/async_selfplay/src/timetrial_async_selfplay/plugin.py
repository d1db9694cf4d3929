"""The opt `async_selfplay`: self-play of the next generation in a separate process, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.seams import Replacement
from core.api.types import Evidence, OptSpec, Plugin, RunContext
from timetrial_minigo.seams import GENERATION

if TYPE_CHECKING:
    from timetrial_async_selfplay.ahead import Ahead
    from timetrial_minigo.seams import Examples


@dataclass(kw_only=True)
class AsyncSelfplayConfig:
    """Settings of `opt.async_selfplay`."""

    device: str = checked(choices=("rank", "cpu"))
    """Where it plays: on the rank's device, or on the CPU."""
    threads: int | None = checked(at_least=1)
    """Its CPU threads; None for as many as the rank has."""


class AsyncSelfplay(Plugin):
    """Has each generation but the first played beside the training on the one before it."""

    spec = OptSpec(
        interface=2,
        summary="self-play of the next generation in a separate process while training goes on",
        numerics="changes",
        replaces=frozenset({GENERATION}),
    )
    Config = AsyncSelfplayConfig
    config: AsyncSelfplayConfig

    _ahead: Ahead | None = None

    @hookimpl
    def replace(self, ctx: RunContext) -> list[Replacement[Any]]:
        return [] if ctx.sidecar else [GENERATION.by(lambda inner: self._beside(ctx))]

    def _beside(self, ctx: RunContext) -> Callable[[int], Examples]:
        from timetrial_async_selfplay.ahead import Ahead

        device = "cpu" if self.config.device == "cpu" else str(ctx.device)
        self._ahead = Ahead(ctx, device, self.config.threads)
        return self._ahead.generation

    def state_dict(self) -> dict[str, Any]:
        return self._ahead.state_dict() if self._ahead else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._ahead and state:
            self._ahead.load_state_dict(state)

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        assert self._ahead is not None
        self._ahead.wait_until_ready()
        ahead = self._ahead
        share = ahead.overlapped_s / ahead.played_s if ahead.played_s else 0.0
        hidden = f"{share:.0%} of their {ahead.played_s:.2f} s of self-play hidden behind training"
        return Evidence(
            plugin="async_selfplay",
            active=ahead.overlapped_s > 0,
            summary=f"{ahead.generations} generations: {hidden}",
            figures={
                "generations": ahead.generations, "played_s": ahead.played_s, "overlapped_s": ahead.overlapped_s,
                "waited_s": ahead.waited_s, "snapshot_s": ahead.snapshot_s,
            },
        )  # fmt: skip
