"""Which searches are full is drawn as it is said to be, and the evidence counts what was searched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core.api.config import validate
from core.api.errors import UsageError
from core.api.types import RunContext
from timetrial_minigo.seams import FIGURE, PLAYOUTS, Playouts
from timetrial_playout_cap.plugin import PlayoutCap, PlayoutCapConfig

GAMES, FULL = 4000, 24


def context(seed: int = 1) -> Any:
    return RunContext(config=None, run_dir=None, seed=seed)  # pyright: ignore[reportArgumentType]


def capped(plugin: PlayoutCap, ctx: Any) -> Playouts:
    """What it makes of playouts that give every move a full search."""

    def inner(generation: int, ply: int, games: int) -> tuple[Tensor, Tensor]:
        return torch.full((games,), FULL), torch.ones(games, dtype=torch.bool)

    (replacement,) = plugin.replace(ctx)
    assert replacement.seam == PLAYOUTS
    return replacement.make(inner)


def settings(full_share: float = 0.25, small: float = 0.1667) -> PlayoutCapConfig:
    return PlayoutCapConfig(full_share=full_share, small=small)


def test_the_share_of_full_searches_is_the_one_asked_for_and_only_they_are_recorded() -> None:
    simulations, recorded = capped(PlayoutCap(settings()), context())(1, 0, GAMES)
    assert set(simulations.tolist()) == {FULL, 4}
    assert torch.equal(recorded, simulations == FULL)
    assert abs(recorded.double().mean().item() - 0.25) < 5 * (0.25 * 0.75 / GAMES) ** 0.5


def test_the_draw_depends_on_seed_generation_and_ply_alone() -> None:
    drawn = [
        capped(PlayoutCap(settings()), context(seed))(generation, ply, 64)[1].tolist()
        for seed, generation, ply in [(1, 1, 0), (1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1)]
    ]
    assert drawn[0] == drawn[1]
    assert all(other != drawn[0] for other in drawn[2:])


@pytest.mark.parametrize(("small", "simulations"), [(0.001, 2), (0.5, 12), (1.0, 24)])
def test_a_small_search_tries_at_least_one_move(small: float, simulations: int) -> None:
    assert capped(PlayoutCap(settings(1e-9, small)), context())(1, 0, 3)[0].tolist() == [simulations] * 3


def test_the_evidence_is_worked_out_from_the_searches_that_took_place() -> None:
    plugin, ctx = PlayoutCap(settings()), context()
    capped(plugin, ctx)
    assert not plugin.verify(ctx).active
    ctx.figures[FIGURE] = {"searches": 100, "recorded": 20, "simulations": 20 * 24 + 80 * 4}
    evidence = plugin.verify(ctx)
    assert evidence.active
    assert evidence.figures["full_share"] == 0.2
    assert evidence.figures["simulations_saved"] == 80 * 20
    assert "66.7% of the simulations saved" in evidence.summary


def test_without_small_searches_it_is_not_active() -> None:
    plugin, ctx = PlayoutCap(settings(full_share=1.0)), context()
    assert capped(plugin, ctx)(1, 0, GAMES)[1].all()
    ctx.figures[FIGURE] = {"searches": 100, "recorded": 100, "simulations": 2400}
    assert not plugin.verify(ctx).active


@pytest.mark.parametrize("key", ["full_share", "small"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_share_out_of_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=key):
        validate(PlayoutCapConfig, {"full_share": 0.25, "small": 0.2, key: value}, "opt.playout_cap")
