"""Networks as players, and games between two of them side by side: how a trained network is held against another.

Letters: N games at hand, H positions of history, P points, L length of a list of earlier positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from timetrial_minigo.features import planes
from timetrial_minigo.go import Boards, Go
from timetrial_minigo.opponent import Choose, Game, Match, play_openings
from timetrial_minigo.search import Evaluate, Search, SearchSettings


def first_choice(go: Go, evaluate: Evaluate, history: int) -> Choose:
    """The legal move that the network's policy likes best, without search."""

    def choose(boards: Boards, history_NHP: Tensor, seen_NL: Tensor) -> Tensor:
        logits, _ = evaluate(planes(history_NHP[:, :history], boards.to_play, go.size))
        return logits.masked_fill(~go.legal(boards, seen_NL), -torch.inf).argmax(1)

    return choose


def searching(
    go: Go, evaluate: Evaluate, history: int, settings: SearchSettings, games: int, symmetry_seed: int | None
) -> Choose:
    """The best move by a search without noise, for up to `games` games at once. With a `symmetry_seed` the network sees
    each leaf under a symmetry drawn at random."""
    search = Search(go, settings, evaluate, games, history)
    random = None if symmetry_seed is None else np.random.default_rng(symmetry_seed)

    def choose(boards: Boards, history_NHP: Tensor, seen_NL: Tensor) -> Tensor:
        search.root(boards, history_NHP[:, :history], seen_NL)
        shape = (settings.simulations, len(boards.to_play))
        search.run(symmetry=None if random is None else torch.from_numpy(random.integers(8, size=shape)).to(go.device))
        return search.best

    return choose


def play_networks(
    go: Go, ours: Choose, theirs: Choose, games: Sequence[int], seed: int,
    *, history: int, opening: int, move_limit: int,
) -> list[Game]:  # fmt: skip
    """As `opponent.play_match`, against another network."""
    match = Match(go, list(games), seed, history, move_limit)
    with torch.no_grad():
        play_openings(match, [], opening)
        while len(running := match.running()):
            our_turn = match.boards.to_play[running].cpu() == match.colours[running]
            for choose, which in ((ours, running[our_turn]), (theirs, running[~our_turn])):
                if len(which):
                    match.play(which, choose(*match.view(which)).cpu())
    return match.results()
