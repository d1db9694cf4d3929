"""The rules of Go for many boards at once, in tensors.

Letters: N boards, S board size, P = S * S points (row by row from the top left), A = P + 1 moves (the last one is the
pass), L length of a list of earlier positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY, BLACK, WHITE = 0, 1, -1

COUNT = 2**9 - 1
"""These bits of a hash count the stones (at most 361, so that no position has them all set)."""


@dataclass(frozen=True)
class Rules:
    """Board size (2 to 19), komi in points, and whether a chain of two or more stones may take its own last liberty."""

    size: int
    komi: float
    suicide: bool = False


class Boards(NamedTuple):
    """N positions, which no function changes; `Boards(*(field[i] for field in boards))` selects some of them."""

    stones: Tensor
    """[N, P] int8: EMPTY, BLACK or WHITE."""
    to_play: Tensor
    """[N] int8: BLACK or WHITE."""
    passes: Tensor
    """[N] int8: passes in a row; a game with two has ended."""
    hash: Tensor
    """[N] int64: sum modulo 2**64 of one random number for each stone, whoever is to play."""
    chain: Tensor
    """[N, P] int16: one number for all stones of a chain, the index of one of them; P where the point is empty."""
    atari: Tensor
    """[N, P] bool: a stone whose chain has exactly one liberty."""


class Go:
    """The rules as functions from boards to boards, on one device."""

    NO_POSITION = -1
    """A hash that no position has: it pads lists of earlier positions."""

    def __init__(self, rules: Rules, device: torch.device | str = "cpu") -> None:
        if not 2 <= rules.size <= 19:
            raise ValueError(f"board size {rules.size}: expected 2 to 19")
        self.rules, self.size, self.device = rules, rules.size, torch.device(device)
        self.points, self.moves = rules.size**2, rules.size**2 + 1
        size, points = self.size, self.points
        point = torch.arange(points)
        row, column = point // size, point % size
        steps = ((row > 0, -size), (row < size - 1, size), (column > 0, -1), (column < size - 1, 1))
        self._beside = torch.stack([on for on, _ in steps], 1).to(device)  # [P, 4] bool: is there a neighbour
        self._near = torch.stack([torch.where(on, point + step, point) for on, step in steps], 1).to(device)
        self._point = point.to(device)
        draw = torch.Generator().manual_seed(0x60)
        keys = torch.randint(-(2**63), 2**63 - 1, (2, points), generator=draw)  # white, black
        self._keys = (keys & ~COUNT | 1).to(device)

    # ------------------------------------------------------------------------------------------------ making boards

    def start(self, n: int) -> Boards:
        """N empty boards, black to play."""
        return self.from_stones(
            torch.zeros(n, self.points, dtype=torch.int8, device=self.device),
            torch.full((n,), BLACK, dtype=torch.int8, device=self.device),
        )

    def from_stones(self, stones_NP: Tensor, to_play_N: Tensor) -> Boards:
        """Positions with nothing passed yet; every chain must have a liberty."""
        stones = stones_NP.to(torch.int8)
        chain = torch.where(stones == EMPTY, self.points, self._point.to(torch.int16))
        alike = (stones[:, self._near] == stones[:, :, None]) & self._beside & (stones != EMPTY)[:, :, None]
        for _ in range(self.points):
            near = torch.where(alike, chain[:, self._near], self.points).amin(2)
            smaller = torch.minimum(chain, near)
            if self.device.type == "cpu" and torch.equal(smaller, chain):
                break
            chain = smaller
        hash = self._keys_of(stones).sum(1)
        passes = torch.zeros_like(to_play_N, dtype=torch.int8)
        return Boards(stones, to_play_N.to(torch.int8), passes, hash, chain, self._atari(stones, chain))

    def play(self, boards: Boards, move_N: Tensor) -> Boards:
        """The boards after one move each, [N] int64. An illegal move gives nonsense; an ended game stays as it is."""
        stones, to_play, passes, hash, chain, _ = boards
        ended = self.ended(boards)
        placed = (move_N < self.points) & ~ended
        point = torch.where(placed, move_N, 0)
        near = self._near[point]
        beside = self._beside[point] & placed[:, None]
        colour = torch.where(beside, stones.gather(1, near) * to_play[:, None], EMPTY)  # 1 ours, -1 theirs
        label = chain.gather(1, near)
        atari = boards.atari.gather(1, near)
        taken, ours = (colour == -1) & atari, colour == 1
        breath = (beside & (colour == EMPTY)) | (ours & ~atari) | taken
        suicide = placed & ~breath.any(1)
        gone = self._is_any(chain, torch.where(taken, label, -1))
        joined = self._is_any(chain, torch.where(ours, label, -1))
        here = (self._point == point[:, None]) & placed[:, None]
        joined = joined | here
        gone = gone | (joined & suicide[:, None])
        after = torch.where(gone, EMPTY, torch.where(here, to_play[:, None], stones))
        chain = torch.where(gone, self.points, torch.where(joined, point[:, None].to(torch.int16), chain))
        hash = hash + torch.where(gone | here, self._keys_of(after) - self._keys_of(stones), 0).sum(1)
        return Boards(
            after,
            torch.where(ended, to_play, -to_play),
            torch.where(ended, passes, torch.where(placed, 0, passes + 1)).to(torch.int8),
            hash,
            chain,
            self._atari(after, chain),
        )

    # ------------------------------------------------------------------------------------------- looking at boards

    def legal(self, boards: Boards, *seen: Tensor) -> Tensor:
        """bool [N, A]: the legal moves.

        `seen`: any number of [N, L] int64, hashes of earlier positions of the same game, padded with NO_POSITION; a
        move that would bring one of them back is not legal (positional superko). The pass always is, and in a game that
        has ended nothing else.
        """
        stones, to_play, _, hash, chain, atari = boards
        ours, theirs = stones == to_play[:, None], stones == -to_play[:, None]
        empty = stones == EMPTY
        beside = self._beside
        lives = empty | (ours & ~atari) | (theirs & atari)
        alive = (lives[:, self._near] & beside).any(2)
        legal = empty & alive
        if self.rules.suicide:
            legal = legal | (empty & (ours[:, self._near] & beside).any(2))
        if seen:
            label = chain.long()
            sums = torch.zeros(len(stones), self.moves, dtype=torch.int64, device=self.device)
            sums = sums.scatter_add(1, label, self._keys_of(stones))
            near_label = label[:, self._near]
            taken = (theirs & atari)[:, self._near] & beside
            lost = (ours[:, self._near] & beside) & ~alive[:, :, None]
            counted = torch.where(taken | lost, near_label, self.points)
            new = hash[:, None] + torch.where(alive, self._keys[(to_play.long() + 1) // 2], 0)
            for d in range(4):
                again = (counted[:, :, :d] == counted[:, :, d : d + 1]).any(2)
                new = new - torch.where(again, 0, sums.gather(1, counted[:, :, d]))
            earlier = torch.cat(seen, 1).sort(1).values
            at = torch.searchsorted(earlier, new).clamp(max=earlier.shape[1] - 1)
            legal = legal & (earlier.gather(1, at) != new)
        legal = legal & ~self.ended(boards)[:, None]
        return torch.cat([legal, torch.ones_like(legal[:, :1])], 1)

    def ended(self, boards: Boards) -> Tensor:
        """bool [N]: two passes in a row."""
        return boards.passes >= 2

    def owner(self, boards: Boards) -> Tensor:
        """int8 [N, P]: colour of the stone, or of the only colour that the empty region reaches, else 0."""
        empty = boards.stones == EMPTY
        reached = []
        for colour in (BLACK, WHITE):
            reach = boards.stones == colour
            for _ in range(self.points):
                more = reach | (empty & (reach[:, self._near] & self._beside).any(2))
                if self.device.type == "cpu" and torch.equal(more, reach):
                    break
                reach = more
            reached.append(reach.to(torch.int8))
        return reached[0] - reached[1]

    def score(self, boards: Boards) -> Tensor:
        """float32 [N]: area of black minus area of white minus komi (Tromp-Taylor: all stones count as alive)."""
        return self.owner(boards).sum(1).float() - self.rules.komi

    # ------------------------------------------------------------------------------------------------------- parts

    def _keys_of(self, stones: Tensor) -> Tensor:
        return torch.where(stones == BLACK, self._keys[1], torch.where(stones == WHITE, self._keys[0], 0))

    def _is_any(self, chain: Tensor, label: Tensor) -> Tensor:
        """bool [N, P]: the chains with one of the labels [N, 4]."""
        return (chain[:, :, None] == label[:, None, :]).any(2)

    def _atari(self, stones: Tensor, chain: Tensor) -> Tensor:
        """bool [N, P]: the stones whose chain's first and last liberty are the same point."""
        n, points = stones.shape
        liberty = (stones == EMPTY)[:, :, None] & self._beside
        chains = torch.where(liberty, chain[:, self._near], points).long().reshape(n, -1)
        at = self._point.repeat_interleave(4).expand(n, -1)
        first = torch.full((n, points + 1), points, device=self.device).scatter_reduce(1, chains, at, "amin")
        last = torch.full((n, points + 1), -1, device=self.device).scatter_reduce(1, chains, at, "amax")
        return (first == last).gather(1, chain.long()) & (stones != EMPTY)
