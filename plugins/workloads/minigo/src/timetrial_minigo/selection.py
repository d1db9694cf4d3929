"""How a search chooses among the moves of a node: PUCT, or the rules of Gumbel MCTS.

A rule keeps a table with one row for each node and, in each row, a few numbers for each move, such that a choice needs
one gather and a few operations on it. Values in the table are those of the player to move at the node.

Letters: R rows of a table (nodes of all games), F nodes at hand, K games at hand, A moves.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

FORBIDDEN = -1e9
"""Added to an illegal move's logit or value: below whatever a legal move can score, and finite, so that products with
zero stay zero."""


class Rule(Protocol):
    table: Tensor
    """[R, C * A] float32: C numbers for each move, all moves of the first of them first."""

    def open(self, rows_F: Tensor, logits_FA: Tensor, value_F: Tensor, legal_FA: Tensor) -> None:
        """Fills in the rows of nodes that the network has just evaluated (value: for the player to move)."""

    def update(self, edge_F: Tensor, visits_F: Tensor, total_F: Tensor, prior_F: Tensor) -> None:
        """Takes in what became of moves: `edge` is a move's first place in the flat table, `visits` and `total` are
        the visits and the sum of the values of the node it leads to, `prior` what `enter` said."""

    def enter(self, edge_F: Tensor) -> tuple[Tensor, Tensor]:
        """For moves made for the first time: prior probability, and the value which the sum of values begins with."""

    def choose(self, rows_F: Tensor, visits_F: Tensor) -> Tensor:
        """int64 [F]: the move to follow from each node, given the node's visits."""


class Puct:
    """score = Q + c(N) sqrt(max(1, N - 1)) P / (1 + n), c(N) = 2 (log((1 + N + base) / base) + init), for a node with N
    visits and a move with n; Q = W / (1 + n), where W begins with the node's own value less a penalty (first-play
    urgency). Source: cc/mcts_tree.h of the v1.1 reference's engine, MctsNode::U_scale, child_U and child_Q."""

    def __init__(self, rows: int, moves: int, base: float, init: float, penalty: float, device: torch.device) -> None:
        self.moves, self.base, self.init, self.penalty = moves, base, init, penalty
        self.table = torch.zeros(rows, 2 * moves, device=device)  # Q, then P / (1 + n)
        self._flat = self.table.view(-1)

    def open(self, rows_F: Tensor, logits_FA: Tensor, value_F: Tensor, legal_FA: Tensor) -> None:
        barred = torch.mul(legal_FA, -FORBIDDEN).add_(FORBIDDEN)  # faster than masked_fill, which is not vectorised
        first = (value_F - self.penalty).clamp_(-1, 1)
        prior = torch.softmax(logits_FA + barred, 1)
        self.table.index_copy_(0, rows_F, torch.cat([barred.add_(first[:, None]), prior], 1))

    def update(self, edge_F: Tensor, visits_F: Tensor, total_F: Tensor, prior_F: Tensor) -> None:
        weight = 1 + visits_F
        self._flat.index_copy_(0, edge_F, total_F / weight)
        self._flat.index_copy_(0, edge_F + self.moves, prior_F / weight)

    def enter(self, edge_F: Tensor) -> tuple[Tensor, Tensor]:
        return self._flat.take(edge_F + self.moves), self._flat.take(edge_F)

    def choose(self, rows_F: Tensor, visits_F: Tensor) -> Tensor:
        return self.scores(rows_F, visits_F).argmax(1)

    def scores(self, rows_F: Tensor, visits_F: Tensor) -> Tensor:
        scale = 2 * (torch.log1p((1 + visits_F) / self.base) + self.init) * (visits_F - 1).clamp_(min=1).sqrt_()
        stats = self.table.index_select(0, rows_F)
        return torch.addcmul(stats[:, : self.moves], stats[:, self.moves :], scale[:, None])

    def mix(self, rows_K: Tensor, noise_KA: Tensor, fraction: float, prior_KA: Tensor, visits_KA: Tensor) -> Tensor:
        """Priors of the roots, mixed with noise over their legal moves and written back (the move's own visits are
        given), as [K, A]."""
        stats = self.table.index_select(0, rows_K)
        noise = noise_KA * (stats[:, : self.moves] > FORBIDDEN / 2)
        noise = noise / noise.sum(1, keepdim=True).clamp_(min=torch.finfo(noise.dtype).tiny)
        mixed = (1 - fraction) * prior_KA + fraction * noise
        stats[:, self.moves :] = mixed / (1 + visits_KA)
        self.table.index_copy_(0, rows_K, stats)
        return mixed


class Gumbel:
    """Gumbel MCTS (Danihelka et al. 2022, "Policy improvement by planning with Gumbel"). At the root, moves drawn
    without replacement by Gumbel-top-k and sequential halving; below, the move whose visits lag most behind the
    improved policy softmax(logits + sigma(completed Q)) (their section 5). sigma(q) = (c_visit + max n) c_scale q with
    q in [0, 1]; moves without visits are given the mixed value of their appendix D."""

    def __init__(self, rows: int, moves: int, c_visit: float, c_scale: float, device: torch.device) -> None:
        self.moves, self.c_visit, self.c_scale = moves, c_visit, c_scale
        self.table = torch.zeros(rows, 3 * moves, device=device)  # logits, Q, n
        self.value = torch.zeros(rows, device=device)
        self._flat = self.table.view(-1)

    def open(self, rows_F: Tensor, logits_FA: Tensor, value_F: Tensor, legal_FA: Tensor) -> None:
        barred = torch.mul(legal_FA, -FORBIDDEN).add_(FORBIDDEN)
        zeros = torch.zeros_like(barred)
        self.table.index_copy_(0, rows_F, torch.cat([barred.add_(logits_FA), zeros, zeros], 1))
        self.value.index_copy_(0, rows_F, value_F)

    def update(self, edge_F: Tensor, visits_F: Tensor, total_F: Tensor, prior_F: Tensor) -> None:
        self._flat.index_copy_(0, edge_F + self.moves, total_F / visits_F.clamp(min=1))
        self._flat.index_copy_(0, edge_F + 2 * self.moves, visits_F)

    def enter(self, edge_F: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(edge_F.shape, device=edge_F.device)
        return nothing, nothing

    def choose(self, rows_F: Tensor, visits_F: Tensor) -> Tensor:
        logits, visits, gain = self._improved(rows_F)
        lag = torch.softmax(logits + gain, 1) - visits / (1 + visits.sum(1, keepdim=True))
        return torch.where(logits > FORBIDDEN / 2, lag, -1).argmax(1)

    def choose_root(self, rows_K: Tensor, gumbel_KA: Tensor, considered_K: Tensor) -> Tensor:
        """int64 [K]: the best of the moves that have `considered` visits (sequential halving's next)."""
        logits, visits, gain = self._improved(rows_K)
        among = visits == considered_K[:, None]
        return torch.where(among, gumbel_KA + logits + gain, 2 * FORBIDDEN).argmax(1)

    def best(self, rows_K: Tensor, gumbel_KA: Tensor) -> Tensor:
        """int64 [K]: the move to play, the best of those with the most visits."""
        visits = self.table.index_select(0, rows_K)[:, 2 * self.moves :]
        return self.choose_root(rows_K, gumbel_KA, visits.amax(1))

    def policy(self, rows_K: Tensor) -> Tensor:
        """[K, A]: the improved policy, what the network is to learn."""
        logits, _, gain = self._improved(rows_K)
        return torch.softmax(logits + gain, 1)

    def _improved(self, rows_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits, visits and sigma(completed Q), each [F, A]."""
        logits, q, visits = self.table.index_select(0, rows_F).split(self.moves, 1)
        seen = (visits > 0).float()
        weight = torch.softmax(logits, 1).mul_(seen)
        total = visits.sum(1, keepdim=True)
        # A move whose probability underflows still counts once it has been visited.
        mean = (weight * q).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_(min=torch.finfo(q.dtype).tiny)
        mixed = (self.value.take(rows_F)[:, None] + total * mean) / (1 + total)
        completed = mixed + seen * (q - mixed)
        return logits, visits, (self.c_visit + visits.amax(1, keepdim=True)) * self.c_scale * (completed + 1) / 2


def considered_visits(moves: int, visits: int) -> list[int]:
    """Sequential halving with a budget of `visits` over the best of `moves` moves, as one number for each visit: how
    many visits the move must have had that is to be given this one. Each of the ceil(log2(moves)) phases has an equal
    share of the budget, spread over half the moves of the phase before (at least two)."""
    if moves <= 1:
        return list(range(visits))
    phases = math.ceil(math.log2(moves))
    done, sequence, left = 0, list[int](), moves
    while len(sequence) < visits:
        for _ in range(max(1, visits // (phases * left))):
            sequence += [done] * left
            done += 1
        left = max(2, left // 2)
    return sequence[:visits]
