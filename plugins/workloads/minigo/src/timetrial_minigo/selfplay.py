"""A generation of self-play: many games side by side, each move by a search of all of them together.

What is drawn for a game depends on the run's seed, the generation, the move's number and the game's own number alone:
not on the rank that plays it, nor on the games beside it.

Letters: G games of the generation, K games at hand, D moves of the longest game, P points, A moves (the last is the
pass).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from timetrial_minigo.go import Go
from timetrial_minigo.replay import join, nothing
from timetrial_minigo.seams import Examples, Playouts, Searched
from timetrial_minigo.search import Evaluate, Search, SearchSettings, draw_noise

BLOCK = 64
"""Games whose noise is drawn together. A rank draws whole blocks, so a large one costs many ranks more than it needs, a
small one costs calls."""


@dataclass(frozen=True, kw_only=True)
class SelfPlaySettings:
    """As in `MiniGoConfig`."""

    parallel_games: int
    opening: int
    move_limit: int
    soft_moves: int
    soft_exponent: float
    resign_threshold: float
    disable_resign_share: float
    holdout_share: float
    train_filter: float
    random_symmetry: bool


class SelfPlay:
    """Plays games with one network. `seed_for` is `RunContext.seed_for`; `after_move(generation, ply)` is called when
    all games have made a move."""

    def __init__(
        self,
        go: Go,
        settings: SelfPlaySettings,
        search: SearchSettings,
        evaluate: Evaluate,
        history: int,
        seed_for: Callable[..., int],
        after_move: Callable[[int, int], None],
    ) -> None:
        self.go, self.settings, self.history = go, settings, history
        self.seed_for, self.after_move = seed_for, after_move
        self.search = Search(go, search, evaluate, settings.parallel_games, history)
        self.counts = Searched(searches=0, recorded=0, simulations=0)

    def play(self, generation: int, games: int, mine: range, playouts: Playouts) -> Examples:
        """The games with the numbers `mine`, of the generation's `games`, in their order."""
        size = self.settings.parallel_games
        parts = [nothing(self.go.points).to(self.go.device)]
        for start in range(mine.start, mine.stop, size):
            numbers = range(start, min(start + size, mine.stop))
            parts.append(_Round(self, generation, games, numbers).play(playouts))
        return join(parts)

    def count(self, searches: int, recorded: bool, simulations: int) -> None:
        """Notes searches, with the simulations of each."""
        self.counts["searches"] += searches
        self.counts["recorded"] += searches * recorded
        self.counts["simulations"] += searches * simulations

    def drawn(self, what: str, generation: int, ply: int, numbers: range, draw: Callable[[int, int], Tensor]) -> Tensor:
        """The rows of the games `numbers` of what `draw(rows, seed)` gives for each block of games."""
        first, last = numbers.start // BLOCK, (numbers.stop - 1) // BLOCK
        seeds = (self.seed_for("selfplay", what, generation, ply, block) for block in range(first, last + 1))
        rows = torch.cat([draw(BLOCK, seed) for seed in seeds])
        return rows[numbers.start - first * BLOCK :][: len(numbers)].to(self.go.device)

    def uniform(self, what: str, generation: int, ply: int, numbers: range, columns: int) -> Tensor:
        """float64 [len(numbers), columns], from 0 to 1."""

        def draw(games: int, seed: int) -> Tensor:
            return torch.from_numpy(np.random.default_rng(seed).random((games, columns)))

        return self.drawn(what, generation, ply, numbers, draw)


class _Round:
    """Some games of a generation, played side by side to the last one's end. `going` [K] are those still going on, by
    their place among the round's games; the search's games are these, in this order."""

    def __init__(self, play: SelfPlay, generation: int, games: int, numbers: range) -> None:
        self.by, self.generation, self.games, self.numbers = play, generation, games, numbers
        settings, go, count = play.settings, play.go, len(numbers)
        # One draw for each: length of the opening, holding out, resigning.
        fate = play.uniform("game", generation, 0, numbers, 3)
        self.opening = (fate[:, 0] * settings.opening).long() + min(settings.opening, 1)
        self.trained = fate[:, 1] >= settings.holdout_share
        self.may_resign = fate[:, 2] >= settings.disable_resign_share
        self.going = torch.arange(count, device=go.device)
        self.outcome = torch.zeros(count, dtype=torch.int8, device=go.device)
        self.stones: list[Tensor] = []  # by ply: [K, P], of the games then going on, as are the next two
        self.learn: list[Tensor] = []
        self.policy: list[Tensor] = []
        self.played: list[Tensor] = []  # by ply: which games these are

    def play(self, playouts: Playouts) -> Examples:
        go, search, limit = self.by.go, self.by.search, self.by.settings.move_limit
        boards = go.start(len(self.numbers))
        history = boards.stones.new_zeros(len(self.numbers), self.by.history, go.points)
        search.root(boards, history, boards.hash[:, None])
        for ply in range(limit):
            move, resigned = self._move(ply, playouts)
            loser = search.boards.to_play
            search.advance(move)
            over = go.ended(search.boards) | resigned | torch.full_like(resigned, ply + 1 == limit)
            if over.any():
                self._end(over, torch.where(resigned, -loser, go.score(search.boards).sign().to(torch.int8)))
            self.by.after_move(self.generation, ply)
            if not len(self.going):
                break
        return self._examples()

    def _move(self, ply: int, playouts: Playouts) -> tuple[Tensor, Tensor]:
        """What each game plays, [K] int64, and in which of them the player resigns instead, [K] bool."""
        go, search, settings = self.by.go, self.by.search, self.by.settings
        mine = slice(self.numbers.start, self.numbers.stop)
        given = playouts(self.generation, ply, self.games)
        simulations, recorded = (tensor[mine].to(go.device)[self.going] for tensor in given)
        thinking = self.opening[self.going] <= ply
        self._search(ply, torch.where(thinking, simulations, 0), recorded)
        resigned = self.may_resign[self.going] & thinking & (search.value < settings.resign_threshold)
        move = search.best if ply >= settings.soft_moves else self._soft(ply, search.best, search.visits)
        if ply < settings.opening:
            priority = self._uniform("opening", ply, go.moves) * go.legal(search.boards, search.seen)
            move = torch.where(thinking, move, priority[:, : go.points].argmax(1))
        kept = self._uniform("filter", ply, 1).squeeze(1) < settings.train_filter
        self.stones.append(search.boards.stones)
        self.learn.append(thinking & recorded & kept & ~resigned & self.trained[self.going])
        self.policy.append(search.policy.half())
        self.played.append(self.going)
        return torch.where(resigned, go.points, move), resigned

    def _soft(self, ply: int, best_K: Tensor, visits_KA: Tensor) -> Tensor:
        """[K] int64: moves drawn by their visits; the best where there are none. On the host: a device has no sum along
        a row that is the same in each run."""
        weight = visits_KA.cpu().double() ** self.by.settings.soft_exponent
        reached = weight.cumsum(1)
        point = self._uniform("move", ply, 1).cpu() * reached[:, -1:]
        move = torch.searchsorted(reached, point, right=True).squeeze(1).clamp(max=self.by.go.points)
        return torch.where(reached[:, -1].to(best_K.device) > 0, move.to(best_K.device), best_K)

    def _search(self, ply: int, simulations_K: Tensor, recorded_K: Tensor) -> None:
        """As many simulations as each game is given; in most runs they are the same for all."""
        settings, go = self.by.search.settings, self.by.go
        noise = self.by.drawn(
            "noise", self.generation, ply, self.numbers, lambda n, seed: draw_noise(settings, n, go.points, seed)
        )[self.going]  # fmt: skip
        for count in simulations_K.unique().tolist():
            for noisy in (True, False):
                which = ((simulations_K == count) & (recorded_K == noisy)).nonzero().squeeze(1)
                if count and len(which):
                    self.by.count(len(which), noisy, count)
                    symmetry = self._symmetry(ply, count)
                    self.by.search.run(
                        count, noise[which] if noisy else None, which, None if symmetry is None else symmetry[:, which]
                    )

    def _symmetry(self, ply: int, simulations: int) -> Tensor | None:
        """[simulations, K] int64: under which symmetry the network sees each leaf."""
        if not self.by.settings.random_symmetry:
            return None
        return (self._uniform("symmetry", ply, simulations) * 8).long().T

    def _uniform(self, what: str, ply: int, columns: int) -> Tensor:
        return self.by.uniform(what, self.generation, ply, self.numbers, columns)[self.going]

    def _end(self, over_K: Tensor, winner_K: Tensor) -> None:
        """Takes out the games that are over."""
        self.outcome[self.going[over_K]] = winner_K[over_K]
        staying = (~over_K).nonzero().squeeze(1)
        self.going = self.going[staying]
        if len(staying):
            self.by.search.keep(staying)

    def _examples(self) -> Examples:
        """The games one after the other: a stable sort by game of what lies there by move."""
        game = torch.cat(self.played)
        order = game.argsort(stable=True)
        ply = torch.cat([torch.full_like(which, number) for number, which in enumerate(self.played)])
        learn = torch.cat(self.learn)[order]
        return Examples(
            stones=torch.cat(self.stones)[order],
            ply=ply[order].to(torch.int16),
            outcome=self.outcome[game[order]],
            learn=learn,
            policy=torch.cat(self.policy)[order[learn]],
        )
