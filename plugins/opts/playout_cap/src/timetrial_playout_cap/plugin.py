"""The opt `playout_cap`: full search on a sampled share of self-play moves; only those are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.seams import Replacement
from core.api.types import Evidence, OptSpec, Plugin, RunContext
from timetrial_minigo.seams import PLAYOUTS, Playouts, searched

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 2
"""Simulations: the first one evaluates the position itself, so that fewer would try no move."""


@dataclass(kw_only=True)
class PlayoutCapConfig:
    """Settings of `opt.playout_cap`."""

    full_share: float = checked(above=0, at_most=1)
    """Share of the moves that get a full search, whose positions are trained on."""
    small: float = checked(above=0, at_most=1)
    """Simulations of the other moves, as a share of the full number; at least 2."""


class PlayoutCap(Plugin):
    """Draws for each move of self-play whether it gets a full search; the others are played fast and not recorded."""

    spec = OptSpec(
        interface=2,
        summary="full search on a sampled share of self-play moves; only those are trained on",
        numerics="changes",
        replaces=frozenset({PLAYOUTS}),
    )
    Config = PlayoutCapConfig
    config: PlayoutCapConfig

    _inner: Playouts | None = None

    @hookimpl
    def replace(self, ctx: RunContext) -> list[Replacement[Any]]:
        def capped(inner: Playouts) -> Playouts:
            self._inner = inner

            def playouts(generation: int, ply: int, games: int) -> tuple[Tensor, Tensor]:
                import torch

                simulations, recorded = inner(generation, ply, games)
                draw = torch.Generator().manual_seed(ctx.seed_for("playout_cap", generation, ply))
                full = torch.rand(games, generator=draw) < self.config.full_share
                return torch.where(full, simulations, self._small(simulations)), recorded & full

            return playouts

        return [PLAYOUTS.by(capped)]

    def _small(self, simulations: Tensor) -> Tensor:
        return (simulations * self.config.small).round().long().clamp(min=LEAST).minimum(simulations)

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        """From the workload's counts of what has been searched: draws for games that are over do not count."""
        assert self._inner is not None
        simulations, _ = self._inner(1, 0, 1)
        counts = searched(ctx.figures)
        searches, full = counts["searches"], counts["recorded"]
        saved = searches * int(simulations) - counts["simulations"]
        sizes = f"{int(simulations)} and {int(self._small(simulations))} simulations"
        share, spared = full / max(1, searches), saved / max(1, searches * int(simulations))
        return Evidence(
            plugin="playout_cap",
            active=0 < full < searches,
            summary=f"{searches} searches of {sizes}, {share:.1%} of them full; {spared:.1%} of the simulations saved",
            figures={
                "searches": searches, "full": full, "full_share": share, "simulations": counts["simulations"],
                "simulations_saved": saved,
            },
        )  # fmt: skip
