"""The rules of Go for many boards at once, in tensors.

Letters: N boards, S board size, P = S * S points (row by row from the top left), A = P + 1 moves (the last one is the
pass), L length of a list of earlier positions, K moves that are looked at one by one.

The rules are area scoring of what stands on the board (Tromp-Taylor), positional superko over the earlier positions
that the caller gives, and suicide forbidden unless the rules allow it for two or more stones. A single stone's suicide
leaves the position as it was, which superko forbids, so it is never legal. Two passes in a row end the game; there is
no limit of moves. open_spiel 2.0 differs in three ways: it forbids only the immediate retaking of a ko, any other
repetition is legal, ends the game and counts as a draw; suicide is never legal; a game ends after 2 * P moves.

How it is fast on a CPU. All chains carry a label, and each stone whether its chain is in atari, so that legality and
captures are read off and never searched for. A move changes the status of at most five chains that touch it (one of
ours, four of theirs), each a bit of one byte plane, so that one spreading of the plane to the neighbours finds the
liberties of all; other chains can only lose their atari, where stones were captured beside them. Planes are bytes,
which torch's CPU kernels handle 64 at a time in `&`, `|`, `^`, `-` and `logical_not` between tensors, but not in
`where`, `masked_fill` or comparisons with a number, which cost 10 to 100 times as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY, BLACK, WHITE = 0, 1, -1

COUNT = 2**9 - 1
"""These bits of a hash count the stones: at most 361, so that no position has them all set."""

OURS, GONE = 0x40, 0x80
"""Bits of a move's plane: the chain of the stone that is played; what it captures. Bits 0 to 3 are the chains of the
opponent above, below, left and right of it."""

FIELD = 10
"""Bits for one count of liberties: at most 361 < 2**10, and five of them fit an int64."""


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
    """[N, P] uint8 (int16 on boards larger than 15x15): one number for all stones of a chain, the index of one of them;
    all bits set (255 or 511) where the point is empty."""
    atari: Tensor
    """[N, P] bool: a stone whose chain has exactly one liberty."""
    lost: Tensor
    """[N, P] uint8: bit 0 where black, bit 1 where white may have lost a stone earlier in the game. Without such a
    loss a stone played there cannot bring back an earlier position."""


class Go:
    """The rules as functions from boards to boards, on one device."""

    NO_POSITION = -1
    """A hash that no position has: it pads lists of earlier positions."""

    def __init__(self, rules: Rules, device: torch.device | str = "cpu") -> None:
        if not 2 <= rules.size <= 19:
            raise ValueError(f"board size {rules.size}: expected 2 to 19")
        self.rules, self.size, self.device = rules, rules.size, torch.device(device)
        self.points, self.moves = rules.size**2, rules.size**2 + 1
        self.compact = self.device.type == "cpu"
        """Whether rare events are looked at on the boards that have them only. A GPU would have to tell the host which
        those are and looks at all boards; the results are the same."""
        size, points = self.size, self.points
        self._label, self._no_chain = (torch.uint8, 2**8 - 1) if points < 2**8 - 1 else (torch.int16, 2**9 - 1)
        point = torch.arange(points)
        row, column = point // size, point % size
        sides = ((row > 0, -size), (row < size - 1, size), (column > 0, -1), (column < size - 1, 1))
        self._steps = [step for _, step in sides]
        self._beside = torch.stack([there for there, _ in sides], 1).to(device)  # [P, 4]: is there a neighbour
        # A missing neighbour is the point itself: it is empty when a stone is played on it, and so changes nothing.
        self._near = torch.stack([torch.where(there, point + step, point) for there, step in sides], 1).to(device)
        self._leaves = [there.to(torch.uint8).neg().to(device) for there, _ in sides]  # bytes that a step may carry
        self._point = point.to(device)
        draw = torch.Generator().manual_seed(0x60)  # any seed: hashes of two runs may be compared
        keys = torch.randint(-(2**63), 2**63 - 1, (2, points), generator=draw)  # of white, of black
        self._keys = (keys & ~COUNT | 1).to(device)
        self._keys_by_move = self._keys.view(-1)
        self._bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=device)
        self._five = torch.tensor([1, 2, 4, 8, OURS], dtype=torch.uint8, device=device)
        self._shifts = FIELD * torch.arange(5, device=device)
        plane = torch.arange(256, device=device)[:, None]
        self._counts = (((plane & self._five) != 0).long() << self._shifts).sum(1)  # byte -> one in each bit's field

    # ------------------------------------------------------------------------------------------------ making boards

    def start(self, n: int) -> Boards:
        """N empty boards, black to play."""
        stones = torch.zeros(n, self.points, dtype=torch.int8, device=self.device)
        boards = self.from_stones(stones, torch.full((n,), BLACK, dtype=torch.int8, device=self.device))
        return boards._replace(lost=torch.zeros_like(boards.lost))

    def from_stones(self, stones_NP: Tensor, to_play_N: Tensor) -> Boards:
        """Positions with nothing passed yet, whatever was played before; every chain must have a liberty."""
        stones = stones_NP.to(torch.int8)
        colour = stones[:, :, None]
        alike = (stones[:, self._near] == colour) & (colour != EMPTY)
        chain = torch.where(stones == EMPTY, self._no_chain, self._point)
        while True:  # the smallest index of a chain goes from neighbour to neighbour
            smaller = torch.minimum(chain, torch.where(alike, chain[:, self._near], self._no_chain).amin(2))
            if torch.equal(smaller, chain):
                break
            chain = smaller
        return Boards(
            stones,
            to_play_N.to(torch.int8),
            torch.zeros_like(to_play_N, dtype=torch.int8),
            self._keys_of(stones).sum(1),
            chain.to(self._label),
            self._atari(stones, chain),
            torch.full_like(stones, 3, dtype=torch.uint8),
        )

    def play(self, boards: Boards, move_N: Tensor) -> Boards:
        """The boards after one move each, [N] int64. An illegal move gives nonsense; an ended game stays as it is."""
        stones, to_play, passes, hash, chain, atari, lost = boards
        running = passes < 2
        placed = (move_N < self.points) & running
        mover, point = to_play * placed, move_N * placed  # 0 and some point where no stone is placed
        at, colour = point[:, None], mover[:, None]

        near = self._near.index_select(0, point)
        side = stones.gather(1, near) * colour  # 1 ours, -1 theirs
        ours, theirs, doomed = side > 0, side < 0, atari.gather(1, near)
        role = torch.where(theirs, torch.where(doomed, GONE, self._bits), ours * OURS).to(torch.uint8)
        stone, captures, winner = placed * OURS, (theirs & doomed).any(1), mover
        if self.rules.suicide:
            breathes = self._beside.index_select(0, point) & ((side == EMPTY) | (doomed ^ ours))
            suicide = placed & ~breathes.any(1)
            role = torch.where(suicide[:, None] & ours, GONE, role)
            stone, captures, winner = stone << suicide, captures | suicide, torch.where(suicide, -mover, mover)

        part = self._marked(chain, chain.gather(1, near), role)
        part.scatter_add_(1, at, stone.to(torch.uint8)[:, None])
        joined, gone = part.view(torch.int8) << 1 >> 7, part.view(torch.int8) >> 7  # bytes: all bits or none
        after = stones.scatter_add(1, at, colour) & ~gone
        label = point.to(self._label)[:, None]
        labels = chain ^ ((chain ^ label) & joined.to(self._label)) | (gone.to(self._label) & self._no_chain)
        lost = lost | (gone.view(torch.uint8) & self._loser(winner)[:, None])
        hash = hash + self._keys.view(-1).index_select(0, point + (mover > 0) * self.points) * placed

        beside = self._spread(part)
        still = atari & part.logical_not()
        single = (part & self._single(beside, after)).bool()
        rows = captures.nonzero()[:, 0] if self.compact else self._every(captures)
        gone = gone.index_select(0, rows)
        keys = self._keys.index_select(0, (winner.index_select(0, rows) < 0).long())
        hash = hash.index_add(0, rows, (keys & gone).sum(1), alpha=-1)
        freed = self._chains_at(chain.index_select(0, rows), still.index_select(0, rows), beside.index_select(0, rows))
        still = still.index_copy(0, rows, still.index_select(0, rows) & ~freed)
        return Boards(
            after,
            to_play * (1 - 2 * running.to(torch.int8)),
            (passes + running) * ~placed,
            hash,
            labels,
            still | single,
            lost,
        )

    # ------------------------------------------------------------------------------------------- looking at boards

    def legal(self, boards: Boards, *seen: Tensor) -> Tensor:
        """bool [N, A]: the legal moves.

        `seen`: any number of [N, L] int64, hashes of earlier positions of the same game, padded with NO_POSITION; a
        move that would bring one of them back is not legal (positional superko). The pass always is, and in a game that
        has ended nothing else.
        """
        stones, to_play, passes, _, _, atari, lost = boards
        side = stones * to_play[:, None]
        theirs = (side >> 1).view(torch.uint8) & 1
        # An empty point, a chain of ours that is not in atari and one of theirs that is: the moves beside are legal.
        lives = theirs ^ atari.view(torch.uint8) ^ 1
        if self.rules.suicide:  # and, as bit 1, any chain of ours
            lives = lives | (side & 1 ^ theirs) << 1
        reach = self._spread(lives)
        legal = reach.bool() & stones.logical_not() & (passes < 2)[:, None]
        if seen and self.compact:
            again = lost & self._loser(-to_play)[:, None]
            if self.rules.suicide:  # leaves no stone at its point
                again = again | (reach == 2)
            legal = self._without_repeats(boards, legal, again.bool(), seen)
        elif seen:
            legal = legal & ~self._repeats(boards, seen)
        return torch.cat([legal, torch.ones_like(legal[:, :1])], 1)

    def ended(self, boards: Boards) -> Tensor:
        """bool [N]: two passes in a row."""
        return boards.passes >= 2

    def owner(self, boards: Boards) -> Tensor:
        """int8 [N, P]: colour of the stone, or of the only colour that the empty region reaches, else 0.

        On a GPU as many rounds as a region can be long, so that the host need not wait; on a CPU until nothing changes.
        """
        black = boards.stones.view(torch.uint8) & 1 ^ ((boards.stones >> 1).view(torch.uint8) & 1)
        white = (boards.stones >> 1).view(torch.uint8) & 2
        reach = black | white
        empty = boards.stones.logical_not().view(torch.uint8).neg()
        for _ in range(self.points):
            more = reach | (self._spread(reach) & empty)
            if self.compact and torch.equal(more, reach):
                break
            reach = more
        reach = reach.view(torch.int8)
        return (reach & 1) - (reach >> 1)

    def score(self, boards: Boards) -> Tensor:
        """float32 [N]: area of black minus area of white minus komi (Tromp-Taylor: all stones count as alive)."""
        return self.owner(boards).sum(1) - self.rules.komi

    # ----------------------------------------------------------------------------------------------------- planes

    def _marked(self, chain: Tensor, label: Tensor, role: Tensor) -> Tensor:
        """uint8 [N, P]: the role [N, 4] of the chains that have the label [N, 4], in one plane; 0 elsewhere."""
        part = torch.zeros_like(chain, dtype=torch.uint8)
        for d in range(4):
            other = (chain ^ label[:, d : d + 1]).clamp_(max=1)
            part |= other.sub_(1).to(torch.uint8) & role[:, d : d + 1]
        return part

    def _spread(self, plane: Tensor) -> Tensor:
        """uint8 [N, P]: of each point, the bits that one of its neighbours has."""
        flat, out = plane.view(-1), torch.zeros_like(plane)
        for step, leaves in zip(self._steps, self._leaves, strict=True):
            moving = (plane & leaves).view(-1)
            if step < 0:
                out.view(-1)[:step] |= moving[-step:]
            else:
                out.view(-1)[step:] |= moving[:-step]
        return out

    def _single(self, beside: Tensor, stones: Tensor) -> Tensor:
        """uint8 [N, 1]: the bits of the chains with exactly one liberty, from the bits beside each point."""
        liberties = beside & stones.logical_not().view(torch.uint8).neg()
        counts = self._counts.index_select(0, liberties.view(-1).long()).view(stones.shape).sum(1, keepdim=True)
        return (((counts >> self._shifts) & (2**FIELD - 1) == 1) * self._five).sum(1, keepdim=True, dtype=torch.uint8)

    def _chains_at(self, chain: Tensor, stones: Tensor, beside: Tensor) -> Tensor:
        """bool [N, P]: the whole chains of those `stones` (bool) that lie beside a captured one; no matter elsewhere."""
        freed = (beside.view(torch.int8) >> 7) & stones
        elsewhere = (freed.logical_not().view(torch.uint8).neg().view(torch.int8)).to(self._label) & self._no_chain
        table = torch.zeros(len(chain), self._no_chain + 1, dtype=torch.bool, device=self.device)
        table.scatter_(1, (chain | elsewhere).long(), True)
        return table.gather(1, chain.long())

    def _loser(self, winner: Tensor) -> Tensor:
        """uint8: the bit in `lost` of the colour against `winner`."""
        return ((winner + 3) >> 1).to(torch.uint8)

    def _every(self, field: Tensor) -> Tensor:
        return torch.arange(len(field), device=self.device)

    def _keys_of(self, stones: Tensor) -> Tensor:
        return torch.where(stones == BLACK, self._keys[1], torch.where(stones == WHITE, self._keys[0], 0))

    def _atari(self, stones: Tensor, chain: Tensor) -> Tensor:
        """bool [N, P]: the stones whose chain's first and last liberty are the same point."""
        n, points = stones.shape
        liberty = (stones == EMPTY)[:, :, None] & self._beside
        chains = torch.where(liberty, chain[:, self._near], self._no_chain).long().reshape(n, -1)
        at = self._point.repeat_interleave(4).expand(n, -1)
        first = torch.full((n, self._no_chain + 1), points, device=self.device).scatter_reduce(1, chains, at, "amin")
        last = torch.full((n, self._no_chain + 1), -1, device=self.device).scatter_reduce(1, chains, at, "amax")
        return (first == last).gather(1, chain.long()) & (stones != EMPTY)

    # ----------------------------------------------------------------------------------------------------- superko

    def _without_repeats(self, boards: Boards, legal: Tensor, again: Tensor, seen: tuple[Tensor, ...]) -> Tensor:
        """`legal` without the moves that repeat, of those that bool [N, P] `again` says may."""
        stones, to_play, _, hash, chain, atari, _ = boards
        candidate = (legal & again).view(-1).nonzero()[:, 0]
        row = candidate // self.points
        point = candidate - row * self.points
        mover = to_play.index_select(0, row)
        near = self._near.index_select(0, point) + (row * self.points)[:, None]
        take = lambda field: field.view(-1).index_select(0, near.view(-1)).view(near.shape)
        side, doomed = take(stones) * mover[:, None], take(atari)
        taken = (side < 0) & doomed
        new = hash.index_select(0, row) + self._keys.view(-1).index_select(0, point + (mover > 0) * self.points)
        winner = mover
        if self.rules.suicide:
            breathes = self._beside.index_select(0, point) & ((side == EMPTY) | (doomed ^ (side > 0)))
            suicide = ~breathes.any(1)
            taken = taken | (suicide[:, None] & (side > 0))
            winner = torch.where(suicide, -mover, mover)
            new = torch.where(suicide, hash.index_select(0, row), new)
        k = taken.any(1).nonzero()[:, 0]
        label = take(chain).index_select(0, k)
        role = taken.index_select(0, k).to(torch.uint8).neg()
        gone = self._marked(chain.index_select(0, row.index_select(0, k)), label, role).view(torch.int8)
        keys = self._keys.index_select(0, (winner.index_select(0, k) < 0).long())
        new.index_add_(0, k, (keys & gone).sum(1), alpha=-1)
        again = torch.zeros_like(row, dtype=torch.bool)
        for earlier in seen:
            again |= (earlier.index_select(0, row) == new[:, None]).any(1)
        legal.view(-1).index_copy_(0, candidate, ~again)
        return legal

    def _repeats(self, boards: Boards, seen: tuple[Tensor, ...]) -> Tensor:
        """bool [N, P]: would a stone played there repeat? For all points at once, without the host."""
        stones, to_play, _, hash, chain, atari, _ = boards
        mover = to_play[:, None]
        label, beside = chain.long(), self._beside
        side = (stones * mover)[:, self._near]
        breathes = (beside & ((side == EMPTY) | (atari[:, self._near] ^ (side > 0)))).any(2)
        taken = beside & torch.where(breathes[:, :, None], (side < 0) & atari[:, self._near], side > 0)
        sums = torch.zeros(len(stones), self._no_chain + 1, dtype=torch.int64, device=self.device)
        sums.scatter_add_(1, label, self._keys_of(stones))
        taken = torch.where(taken, label[:, self._near], self._no_chain)
        new = hash[:, None] + torch.where(breathes, self._keys[(to_play > 0).long()], 0)
        for d in range(4):
            counted = (taken[:, :, :d] == taken[:, :, d : d + 1]).any(2)
            new -= torch.where(counted, 0, sums.gather(1, taken[:, :, d]))
        earlier = torch.cat(seen, 1).sort(1).values
        at = torch.searchsorted(earlier, new).clamp(max=earlier.shape[1] - 1)
        return earlier.gather(1, at) == new
