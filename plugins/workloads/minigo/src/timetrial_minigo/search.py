"""Batched Monte-Carlo tree search: one tree for each game, all leaves evaluated in one call of the network.

Letters: G games, K games at hand, N boards, H positions of history, P points, A moves (the last is the pass), L length
of a list of earlier positions, T simulations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from timetrial_minigo.features import inverse_symmetries, planes, symmetries
from timetrial_minigo.go import Boards, Go
from timetrial_minigo.selection import FORBIDDEN, Gumbel, Puct, considered_visits
from timetrial_minigo.tree import OPEN, PENDING, Descent, Tree, rows_of

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`planes [N, C, S, S] -> (logits [N, A], value [N])`; the value lies in [-1, 1] and is that of the player to move."""


@dataclass(frozen=True)
class SearchSettings:
    """What a search does for each move; the defaults are the v1.1 reference's."""

    simulations: int = 64
    """Descents for each move. The first one evaluates a root that has not been evaluated."""
    method: Literal["puct", "gumbel"] = "puct"
    c_puct_base: float = 19652.0
    c_puct_init: float = 1.25
    value_init_penalty: float = 2.0
    """A move without visits is worth its position's value less this (at least -1): 0 is the position's own value, 2 a
    loss."""
    noise_alpha: float = 0.03 * 361
    """The Dirichlet distribution's parameter at the root is this divided by the number of points."""
    noise_fraction: float = 0.25
    leaves: int = 1
    """Descents of a game for each call of the network, kept apart by virtual losses."""
    reuse: bool = False
    """Keep what is known of the move that is played."""
    nodes: int = 0
    """Room for a game's tree, with `reuse`; 0 is four moves' simulations. What is left of a tree is dropped where it
    leaves no room for another move's."""
    considered: int = 16
    """gumbel: moves drawn at the root."""
    c_visit: float = 50.0
    c_scale: float = 1.0
    network_batch: int = 0
    """Positions in one call of the network; 0 is all at once."""

    def __post_init__(self) -> None:
        if self.simulations < 1 or self.leaves < 1:
            raise ValueError("simulations and leaves: expected at least 1")
        if self.method == "gumbel" and (self.leaves > 1 or self.reuse):
            raise ValueError("method gumbel counts every visit: it takes leaves=1 and reuse=false")
        if self.reuse and self.room <= self.simulations:
            raise ValueError(f"nodes={self.nodes}: expected more than the {self.simulations} simulations of one move")

    @property
    def room(self) -> int:
        return (self.nodes or 4 * self.simulations) if self.reuse else self.simulations


def draw_noise(settings: SearchSettings, games: int, points: int, seed: int) -> Tensor:
    """float32 [games, points + 1]: what `Search.run` takes for one move of each game; a function of its arguments alone
    (drawn on the host), so that the rows of a rank are the same whatever the other ranks do."""
    random, shape = np.random.default_rng(seed), (games, points + 1)
    if settings.method == "gumbel":
        return torch.from_numpy(random.gumbel(size=shape).astype(np.float32))
    draws = random.standard_gamma(settings.noise_alpha / points, size=shape)
    return torch.from_numpy((draws / draws.sum(1, keepdims=True).clip(1e-300)).astype(np.float32))


class Search:
    """The trees of up to `games` games.

    On CUDA nothing waits for the device but: one comparison for each level of a descent, one question for each descent
    whether a game has ended in it, and a few questions for each move.
    """

    def __init__(self, go: Go, settings: SearchSettings, evaluate: Evaluate, games: int, history: int) -> None:
        self.go, self.settings, self.evaluate = go, settings, evaluate
        rows = rows_of(games, settings.room, history) + 1
        if settings.method == "puct":
            base, init, penalty = settings.c_puct_base, settings.c_puct_init, settings.value_init_penalty
            self.puct = rule = Puct(rows, go.moves, base, init, penalty, go.device)
        else:
            self.gumbel = rule = Gumbel(rows, go.moves, settings.c_visit, settings.c_scale, go.device)
        self.tree = Tree(go, rule, games, settings.room, history)
        self._turn, self._turn_back = symmetries(go.size).to(go.device), inverse_symmetries(go.size).to(go.device)

    # --------------------------------------------------------------------------------------------------- the roots

    def root(self, boards: Boards, history_NHP: Tensor, seen_NL: Tensor) -> None:
        """New trees, for N games. `history` begins with the present position (int8, zeros before the game began);
        `seen` holds the hashes of all positions so far, the present one included, padded with Go.NO_POSITION."""
        self.tree.plant(boards, history_NHP)
        self._settle(history_NHP, seen_NL, 1)

    def advance(self, moves_G: Tensor) -> None:
        """One move in each game; the next roots. A game that has ended stays as it is."""
        boards = self.go.play(self.boards, moves_G)
        history = torch.cat([boards.stones[:, None], self.history[:, :-1]], 1)
        seen = torch.cat([self.seen, boards.hash[:, None]], 1)
        if not self.settings.reuse:
            self.root(boards, history, seen)
            return
        roots = self.tree.roots()
        child = self.tree.child[roots, moves_G].long()
        heads = torch.where(child != roots, child, -1)
        self._rebase(heads, roots, boards, history, seen)

    def keep(self, games_K: Tensor) -> None:
        """Goes on with these games only, which are now games 0 to K - 1."""
        boards, history, seen = self.tree.select(games_K), self.history[games_K], self.seen[games_K]
        if not self.settings.reuse:
            self.root(boards, history, seen)
            return
        self._rebase(games_K, games_K, boards, history, seen)

    def _rebase(self, heads: Tensor, games: Tensor, boards: Boards, history: Tensor, seen: Tensor) -> None:
        room = self.settings.room - self.settings.simulations
        used = self.tree.rebase(heads, games, boards, history, int(self._used.max()), room)
        self._settle(history, seen, used)

    def _settle(self, history: Tensor, seen: Tensor, used: int) -> None:
        self.history, self.seen = history, seen
        self._used = np.full(self.games, used)
        self._gumbel = torch.zeros(self.games, self.go.moves, device=self.go.device)

    @property
    def games(self) -> int:
        return self.tree.games

    @property
    def boards(self) -> Boards:
        """The positions at the roots."""
        return self.tree.select(self.tree.roots())

    # ---------------------------------------------------------------------------------------------------- searching

    def run(
        self,
        simulations: int | None = None,
        noise: Tensor | None = None,
        games: Tensor | None = None,
        symmetry: Tensor | None = None,
    ) -> None:
        """Searches in all games, or in those with the numbers `games` [K].

        `noise` [K, A], from `draw_noise`, is mixed into the priors of the roots (puct) or is what the moves are drawn
        with (gumbel). `symmetry` [T, K] (int64, 0 to 7): the symmetry under which the network sees each leaf.
        """
        simulations = self.settings.simulations if simulations is None else simulations
        games = self.tree.roots() if games is None else games
        state = self.tree.state.take(games)
        waiting, known = (state == PENDING).nonzero().squeeze(1), (state != PENDING).nonzero().squeeze(1)
        first = 0 if (state == OPEN).any() else 1  # the first simulation in need of a node
        slot = self._take_slots(games, simulations - first)
        seen = self.seen.index_select(0, games)
        noisy = noise is not None and self.settings.method == "puct"
        if noisy and len(known):
            self._mix(games[known], noise[known])
        if len(waiting):
            self._evaluate_roots(games[waiting], None if symmetry is None else symmetry[0, waiting])
            if noisy:
                self._mix(games[waiting], noise[waiting])
        plan = None
        if self.settings.method == "gumbel":
            self._gumbel.index_copy_(0, games, torch.zeros_like(self._gumbel[games]) if noise is None else noise)
            plan = self._plan(games, simulations - 1)
        elif len(known):
            self._simulate(games[known], seen[known], slot, 1, None if symmetry is None else symmetry[:1, known])
        for at in range(1, simulations, self.settings.leaves):
            until = min(at + self.settings.leaves, simulations)
            if plan is not None:
                self.tree.point(games, self.gumbel.choose_root(games, self._gumbel[games], plan[at - 1]))
            seen_as = None if symmetry is None else symmetry[at:until]
            self._simulate(games, seen, slot + at - first, until - at, seen_as)

    def _take_slots(self, games_K: Tensor, count: int) -> int:
        """The first of this number of slots that are free in all of the games."""
        games = games_K.cpu().numpy()
        slot = int(self._used[games].max(initial=1))
        if slot + count > self.settings.room:
            raise ValueError(f"{count} nodes more: the trees have room for {self.settings.room - slot}")
        self._used[games] = slot + count
        return slot

    def _mix(self, roots_K: Tensor, noise_KA: Tensor) -> None:
        child, visits = self.tree.children(roots_K)
        made = child != roots_K[:, None]
        table = self.puct.table.index_select(0, roots_K)[:, self.go.moves :]
        prior = torch.where(made, self.tree.prior.take(child), table)
        mixed = self.puct.mix(roots_K, noise_KA, self.settings.noise_fraction, prior, visits)
        # Where a move has not been made its row is the root's own, which has no use for a prior.
        self.tree.prior.index_copy_(0, child.flatten(), torch.where(made, mixed, 0).flatten())
        self.tree.refresh(roots_K)

    def _plan(self, roots_K: Tensor, visits: int) -> Tensor:
        """[visits, K]: how often the move must have been visited that each of the visits is given to."""
        legal = (self.gumbel.table.index_select(0, roots_K)[:, : self.go.moves] > FORBIDDEN / 2).sum(1)
        most = self.settings.considered
        table = torch.tensor([considered_visits(m, visits) for m in range(most + 1)], device=self.go.device)
        return table.index_select(0, legal.clamp(max=most)).T

    def _evaluate_roots(self, roots_K: Tensor, symmetry_K: Tensor | None) -> None:
        legal = self.go.legal(self.tree.select(roots_K), self.seen.index_select(0, roots_K))
        value = self._evaluate(roots_K, legal, symmetry_K)
        self.tree.credit(roots_K, 1, value, None)
        self.tree.refresh(roots_K)

    def _simulate(self, games_K: Tensor, seen_KL: Tensor, slot: int, leaves: int, symmetry_JK: Tensor | None) -> None:
        """One descent, or `leaves` of them kept apart by virtual losses, in each of the games; one evaluation."""
        tree = self.tree
        descents = list[Descent]()
        for j in range(leaves):
            descent = tree.descend(games_K, slot + j, seen_KL)
            descents.append(descent)
            if leaves > 1:  # the end of a game counts at once, other leaves are claimed
                over = descent.over_K.float()
                ends = over * tree.outcome.take(descent.leaf_K)
                own = descent.owner_F
                tree.credit(descent.rows_F, over.take(own), ends.take(own), 1 - over.take(own))
                tree.refresh(descent.rows_F)
        symmetry = None
        if symmetry_JK is not None:
            symmetry = torch.cat([s.take(d.which_F) for s, d in zip(symmetry_JK, descents, strict=True)])
        rows = torch.cat([d.evaluate_F for d in descents])
        values = self._evaluate(rows, torch.cat([d.legal_FA for d in descents]), symmetry)
        for descent, value in zip(descents, values.split([len(d.which_F) for d in descents]), strict=True):
            own, over = descent.owner_F, descent.over_K.float()
            fresh = descent.fresh_K.float()
            won = torch.zeros_like(fresh).index_copy_(0, descent.which_F, value).mul_(fresh)
            if leaves == 1:
                result = torch.where(descent.over_K, tree.outcome.take(descent.leaf_K), won)
                tree.credit(descent.rows_F, 1, result.take(own), None)
            else:  # a leaf that another descent has claimed counts once
                tree.credit(descent.rows_F, fresh.take(own), won.take(own), over.take(own) - 1)
        for descent in descents:
            self._refresh(descent)

    def _refresh(self, descent: Descent) -> None:
        """Of the nodes on the way; the first are the roots, where Gumbel MCTS chooses by its own plan."""
        roots = len(descent.games_K) if self.settings.method == "gumbel" else 0
        self.tree.refresh(descent.rows_F[roots:])

    def _evaluate(self, rows_F: Tensor, legal_FA: Tensor, symmetry_F: Tensor | None) -> Tensor:
        """The network's values of new nodes, as black sees them; the nodes are open afterwards."""
        values = list[Tensor]()
        size = self.settings.network_batch or max(1, len(rows_F))
        for at in range(0, len(rows_F), size):
            part = slice(at, at + size)
            rows = rows_F[part]
            stones, to_play = self.tree.stones(rows), self.tree.boards.to_play.take(rows)
            if symmetry_F is not None:
                turn = self._turn[symmetry_F[part]]
                stones = stones.gather(2, turn[:, None].expand_as(stones))
            logits, value = self.evaluate(planes(stones, to_play, self.go.size))
            logits, value = logits.float(), value.float()
            if symmetry_F is not None:
                logits = logits.gather(1, self._turn_back[symmetry_F[part]])
            self.tree.evaluated(rows, logits, value, legal_FA[part])
            values.append(value * to_play)
        return torch.cat(values) if values else torch.zeros(0, device=rows_F.device)

    # ------------------------------------------------------------------------------------------------------ results

    @property
    def visits(self) -> Tensor:
        """float32 [G, A]: how often each move was tried."""
        return self.tree.children(self.tree.roots())[1]

    @property
    def value(self) -> Tensor:
        """float32 [G]: the mean value of the root, for the player to move (puct: W / (1 + N), as the reference, whose
        resignation goes by it)."""
        roots, tree = self.tree.roots(), self.tree
        count = tree.visits.take(roots) + (self.settings.method == "puct")
        return -tree.total.take(roots) * tree.mover.take(roots) / count.clamp(min=1)

    @property
    def policy(self) -> Tensor:
        """float32 [G, A]: what the network is to learn: shares of the visits, or (gumbel) the improved policy."""
        if self.settings.method == "gumbel":
            return self.gumbel.policy(self.tree.roots())
        visits = self.visits
        return visits / visits.sum(1, keepdim=True).clamp_(min=1)

    @property
    def best(self) -> Tensor:
        """int64 [G]: the move to play: the most visited one; of several, the one with the best score."""
        roots = self.tree.roots()
        if self.settings.method == "gumbel":
            return self.gumbel.best(roots, self._gumbel)
        visits = self.visits
        scores = self.puct.scores(roots, self.tree.visits.take(roots))
        return torch.where(visits == visits.amax(1, keepdim=True), scores, 2 * FORBIDDEN).argmax(1)
