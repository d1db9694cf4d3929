"""The opt `async_selfplay`: self-play of the next generation in a process of its own, while training goes on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.errors import PluginError
from core.api.hooks import hookimpl
from core.api.types import Evidence, OptSpec, Plugin, RunContext

if TYPE_CHECKING:
    from timetrial_async_selfplay.ahead import Ahead


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
        interface=1,
        summary="self-play of the next generation in a process of its own while training goes on",
        numerics="changes",
        conflicts={"fsdp": "ranks that share a sharded model must call it together, and their games end apart"},
        components=frozenset({"minigo.generation"}),
    )
    Config = AsyncSelfplayConfig
    config: AsyncSelfplayConfig

    _ahead: Ahead | None = None

    @hookimpl(wrapper=True)
    def component(self, ctx: RunContext, name: str) -> Generator[None, Any, Any]:
        inner = yield
        if name != "minigo.generation" or multiprocessing.current_process().daemon:
            return inner  # a daemon is a helper of another opt, such as an evaluator: nobody plays there
        if ctx.synthetic:
            raise PluginError("opt 'async_selfplay' does not apply to synthetic data: nobody plays; leave it out")
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
