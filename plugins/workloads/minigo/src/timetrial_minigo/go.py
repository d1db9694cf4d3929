"""The rules of Go for many boards at once, in tensors.

Letters: N boards, S board size, P = S * S points (row by row from the top left), A = P + 1 moves (the last one is the
pass), L length of a list of earlier positions, K moves looked at one by one.

What is played: area scoring of what is on the board (Tromp-Taylor; all stones count as alive); positional superko
over the earlier positions that the caller gives; suicide of two or more stones if the rules allow it. A single stone's
suicide would leave the position as it is, which superko forbids, so it never is legal. Two passes in a row end the
game; there is no limit of moves. open_spiel's Go differs in three ways: of repetitions it forbids only the immediate
retaking of a ko, and any other one, a pass aside, ends the game as a draw; suicide is never legal; a game ends after
2 * P moves and is scored.

How it is fast. Every stone carries a label of its chain and whether the chain is in atari, so that captures and
legality are read off and nothing is searched for. A move decides anew about five chains at most: the one that it makes
or extends and those of the opponent that it touches. Each is a bit of one byte plane, and spreading that plane to the
neighbours finds the liberties of all five. Any other chain can only gain liberties, where stones beside it are
captured. Only a point that has lost a stone of the same colour can bring an earlier position back.

Why it is written with `&`, `|`, `^`, shifts and `logical_not` between byte planes: torch's CPU kernels handle 64 bytes
at a time there, and in `where`, `masked_fill` and comparisons with a number one (10 to 100 times as long, torch 2.11).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY, BLACK, WHITE = 0, 1, -1

COUNT = 2**9 - 1
"""These bits of a hash count the stones: at most 361, so that no position has them all set."""

SIDES = (1, 2, 4, 8)
OURS, GONE = 64, 128
"""Roles in a move, bits of a byte: the opponent's chain above, below, left and right of it; our chain that it makes or
extends; the chains that leave the board. A signed byte shifted right by 7 has all bits or none, as it has the last."""

FIELD = 10
"""Bits for a number of liberties: at most 361 < 2**10, and five of them fit an int64."""


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
    """[N] int64: sum modulo 2**64 of a number for each stone (Zobrist), whoever is to play."""
    chain: Tensor
    """[N, P] uint8 (int16 on boards larger than 15x15): one number for all stones of a chain, the index of one of them;
    all bits set (255, 511) where the point is empty."""
    atari: Tensor
    """[N, P] bool: a stone whose chain has exactly one liberty."""
    lost: Tensor
    """[N, P] uint8: bit 0 where black, bit 1 where white may have lost a stone earlier in the game."""


class _Touched(NamedTuple):
    """What stones on the board a move on each of K boards acts on."""

    chain: Tensor
    """[K, 4] int64: labels of the neighbours."""
    role: Tensor
    """[K, 4] uint8: SIDES, OURS or GONE; 0 for no stone."""
    stone: Tensor
    """[K] uint8: the role of the stone itself; 0 where none is played."""
    takes: Tensor
    """[K] bool: do stones leave the board."""
    winner: Tensor
    """[K] int8: the colour that does not lose them."""


class Go:
    """The rules as functions from boards to boards, on one device."""

    NO_POSITION = -1
    """A hash that no position has: it pads lists of earlier positions."""

    def __init__(self, rules: Rules, device: torch.device | str = "cpu") -> None:
        if not 2 <= rules.size <= 19:
            raise ValueError(f"board size {rules.size}: expected 2 to 19")
        self.rules, self.size, self.device = rules, rules.size, torch.device(device)
        self.points, self.moves = rules.size**2, rules.size**2 + 1
        self.selects = self.device.type == "cpu"
        """Whether rare events are looked at only where they occur. A GPU would have to tell the host where that is, and
        looks everywhere. The results are the same."""
        size, points = self.size, self.points
        self._label, self._no_chain = (torch.uint8, 2**8 - 1) if points < 2**8 else (torch.int16, 2**9 - 1)
        point = torch.arange(points)
        row, column = point // size, point % size
        sides = ((row > 0, -size), (row < size - 1, size), (column > 0, -1), (column < size - 1, 1))
        self._point = point.to(device)
        self._beside = torch.stack([there for there, _ in sides], 1).to(device)  # [P, 4] bool: is there a neighbour
        # A missing neighbour is the point itself: empty when a stone is played there, and so without effect.
        self._near = torch.stack([torch.where(there, point + step, point) for there, step in sides], 1).to(device)
        self._steps = [step for _, step in sides]
        self._leaving = [there.to(torch.uint8).neg().to(device) for there, _ in sides]  # bytes: all bits or none
        draw = torch.Generator().manual_seed(7)  # any seed, but the same in all processes
        keys = torch.randint(-(2**63), 2**63 - 1, (2, points), generator=draw)  # of white, of black
        self._keys = (keys & ~COUNT | 1).to(device)
        self._sides = torch.tensor(SIDES, dtype=torch.uint8, device=device)
        self._decided = torch.tensor([*SIDES, OURS], dtype=torch.uint8, device=device)
        self._fields = FIELD * torch.arange(len(SIDES) + 1, device=device)
        byte = torch.arange(2**8, device=device)[:, None]
        self._ones = (((byte & self._decided) != 0).long() << self._fields).sum(1)  # of a byte: 1 in each bit's field

    # ------------------------------------------------------------------------------------------------ making boards

    def start(self, n: int) -> Boards:
        """N empty boards, black to play."""
        stones = torch.zeros(n, self.points, dtype=torch.int8, device=self.device)
        boards = self.from_stones(stones, torch.full((n,), BLACK, device=self.device))
        return boards._replace(lost=torch.zeros_like(boards.lost))

    def from_stones(self, stones_NP: Tensor, to_play_N: Tensor) -> Boards:
        """Positions that games may be at, nothing passed; every chain must have a liberty. The host waits for it."""
        stones, to_play = stones_NP.to(torch.int8), to_play_N.to(torch.int8)
        alike = (stones[:, self._near] == stones[:, :, None]) & (stones != EMPTY)[:, :, None]
        chain = torch.where(stones == EMPTY, self._no_chain, self._point)
        while True:  # the smallest index of a chain goes from neighbour to neighbour
            smaller = torch.minimum(chain, torch.where(alike, chain[:, self._near], self._no_chain).amin(2))
            if torch.equal(smaller, chain):
                break
            chain = smaller
        return Boards(
            stones,
            to_play,
            passes=torch.zeros_like(to_play),
            hash=self._keys_of(stones).sum(1),
            chain=chain.to(self._label),
            atari=self._in_atari(stones, chain),
            lost=torch.full_like(stones, 0b11, dtype=torch.uint8),
        )

    def play(self, boards: Boards, move_N: Tensor) -> Boards:
        """The boards after one move each, [N] int64. An illegal move gives nonsense; an ended game stays as it is."""
        stones, to_play, passes, hash, chain, atari, lost = boards
        running = passes < 2
        placed = (move_N < self.points) & running
        mover, point = to_play * placed, move_N * placed  # nobody and some point where no stone is placed
        row, at = torch.arange(len(mover), device=self.device), point[:, None]
        touched = self._touch(boards, row, point, mover)

        part = self._marked(chain.long(), touched)
        part.scatter_(1, at, touched.stone[:, None])  # 0 on 0 where no stone is placed
        ours, gone = part.view(torch.int8) << 1 >> 7, part.view(torch.int8) >> 7  # bytes: all bits or none
        stones = stones.scatter_add(1, at, mover[:, None]) & ~gone
        joined = chain ^ ((chain ^ at.to(self._label)) & ours.to(self._label))
        beside = self._spread(part)
        others = atari & part.logical_not()
        decided = (part & self._single(beside, stones)).bool()

        rows = touched.takes.nonzero()[:, 0] if self.selects else row
        gained = self._chains_beside(*(field.index_select(0, rows) for field in (beside, others, chain)))
        others = others.index_copy(0, rows, others.index_select(0, rows) & ~gained)
        removed = self._keys_gone(gone.index_select(0, rows), touched.winner.index_select(0, rows))
        return Boards(
            stones,
            torch.where(running, -to_play, to_play),
            (passes + running) * ~placed,
            (hash + self._key(point, mover) * placed).index_add_(0, rows, removed, alpha=-1),
            joined | (gone.to(self._label) & self._no_chain),
            others | decided,
            lost | (gone.view(torch.uint8) & self._bit(-touched.winner)[:, None]),
        )

    # ------------------------------------------------------------------------------------------- looking at boards

    def legal(self, boards: Boards, *seen: Tensor) -> Tensor:
        """bool [N, A]: the legal moves.

        `seen`: any number of [N, L] int64, hashes of positions that the game on these boards came through, padded with
        NO_POSITION; a move that would bring one of them back is not legal (positional superko). The pass always is, and
        in a game that has ended nothing else.
        """
        side = boards.stones * boards.to_play[:, None]  # 1 ours, -1 theirs
        theirs = (side >> 1).view(torch.uint8) & 1
        # Legal is beside an empty point, a chain of ours that is not in atari, or one of theirs that is.
        friendly = theirs ^ boards.atari.view(torch.uint8) ^ 1
        if self.rules.suicide:  # bit 1: also beside any chain of ours
            friendly = friendly | ((side & 1).view(torch.uint8) ^ theirs) << 1
        beside = self._spread(friendly)
        legal = beside.bool() & boards.stones.logical_not() & (boards.passes < 2)[:, None]
        if seen and self.selects:
            may_repeat = (boards.lost & self._bit(boards.to_play)[:, None]).bool()
            if self.rules.suicide:  # leaves no stone behind
                may_repeat |= beside == 0b10
            move = (legal & may_repeat).view(-1).nonzero()[:, 0]
            if len(move):
                legal.view(-1).index_fill_(0, self._repeating(boards, move, seen), False)
        elif seen:
            legal &= ~self._all_repeating(boards, seen)
        return torch.cat([legal, torch.ones_like(legal[:, :1])], 1)

    def ended(self, boards: Boards) -> Tensor:
        """bool [N]: two passes in a row."""
        return boards.passes >= 2

    def owner(self, boards: Boards) -> Tensor:
        """int8 [N, P]: colour of the stone, or of the only colour that the empty region reaches, else 0."""
        stones = boards.stones
        white = (stones >> 1).view(torch.uint8) & 1
        colours = ((stones & 1).view(torch.uint8) ^ white) | white << 1  # bit 0 black, bit 1 white
        empty = stones.logical_not().view(torch.uint8).neg()
        reached = colours
        for _ in range(self.points):  # longer than any region
            more = colours | (self._spread(reached) & empty)
            if self.selects and torch.equal(more, reached):
                break
            reached = more
        reached = reached.view(torch.int8)
        return (reached & 1) - (reached >> 1)

    def score(self, boards: Boards) -> Tensor:
        """float32 [N]: area of black minus area of white minus komi. Costs tens of moves: give it ended games only."""
        return self.owner(boards).sum(1) - self.rules.komi

    # ---------------------------------------------------------------------------------------------- parts of a move

    def _touch(self, boards: Boards, row: Tensor, point: Tensor, mover: Tensor) -> _Touched:
        """What the moves at `point` on the boards `row` act on; all [K], `mover` int8 is 0 where nothing is played."""
        near = self._near.index_select(0, point) + (row * self.points)[:, None]
        side, atari = boards.stones.take(near) * mover[:, None], boards.atari.take(near)
        ours, theirs = side > 0, side < 0
        taken, stone, winner = theirs & atari, (mover != 0) * OURS, mover
        takes = taken.any(1)
        if self.rules.suicide:
            breath = ((side == EMPTY) & self._beside.index_select(0, point)) | (ours & ~atari)
            suicide = ~(breath.any(1) | takes) & (mover != 0)
            taken, stone = taken | (ours & suicide[:, None]), torch.where(suicide, GONE, stone)
            takes, winner = takes | suicide, torch.where(suicide, -mover, mover)
        role = torch.where(taken, GONE, torch.where(ours, OURS, theirs * self._sides)).to(torch.uint8)
        return _Touched(boards.chain.take(near).long(), role, stone.to(torch.uint8), takes, winner)

    def _marked(self, chain: Tensor, touched: _Touched) -> Tensor:
        """uint8 [K, P]: on each chain (int64 [K, P]) its role, and 0 on those that are not touched.

        A chain that is touched from two sides gets one of their bits, no matter which.
        """
        role = torch.zeros(len(chain), self._no_chain + 1, dtype=torch.uint8, device=self.device)
        return role.scatter_(1, touched.chain, touched.role).gather(1, chain)

    def _spread(self, plane: Tensor) -> Tensor:
        """uint8 [K, P]: for each point, the bits that its neighbours have in `plane`."""
        beside = torch.zeros(plane.shape, dtype=torch.uint8, device=self.device)
        flat = beside.view(-1)  # shifts of whole memory: what would step over an edge stays behind
        for step, leaving in zip(self._steps, self._leaving, strict=True):
            moving = (plane & leaving).reshape(-1)
            if step > 0:
                flat[step:].bitwise_or_(moving[:-step])
            else:
                flat[:step].bitwise_or_(moving[-step:])
        return beside

    def _single(self, beside: Tensor, stones: Tensor) -> Tensor:
        """uint8 [K, 1]: those of the five chains that have one liberty; `beside` has their bits beside their stones."""
        liberties = beside & stones.logical_not().view(torch.uint8).neg()
        ones = self._ones.index_select(0, liberties.view(-1).long()).view(stones.shape)
        number = ones.sum(1, keepdim=True) >> self._fields & (2**FIELD - 1)  # [K, 5]
        return ((number == 1) * self._decided).sum(1, keepdim=True, dtype=torch.uint8)

    def _chains_beside(self, beside: Tensor, stones: Tensor, chain: Tensor) -> Tensor:
        """bool [K, P]: the chains of which one of the `stones` (bool) has GONE in `beside`."""
        elsewhere = ((beside.view(torch.int8) >> 7) & stones) - 1  # all bits or none
        marked = torch.zeros(len(chain), self._no_chain + 1, dtype=torch.bool, device=self.device)
        marked.scatter_(1, (chain | (elsewhere.to(self._label) & self._no_chain)).long(), True)
        return marked.gather(1, chain.long())

    def _bit(self, colour: Tensor) -> Tensor:
        """uint8: the bit of the colour in `lost`; of no colour, any."""
        return ((3 - colour) >> 1).to(torch.uint8)

    # ----------------------------------------------------------------------------------------- hashes and superko

    def _key(self, point: Tensor, colour: Tensor) -> Tensor:
        """int64 [K]: what a stone of that colour adds to the hash."""
        return self._keys.view(-1).index_select(0, point + (colour > 0) * self.points)

    def _keys_of(self, stones: Tensor) -> Tensor:
        """int64 [N, P]: what each stone adds to the hash."""
        return torch.where(stones == EMPTY, 0, torch.where(stones == BLACK, self._keys[1], self._keys[0]))

    def _keys_gone(self, gone: Tensor, winner: Tensor) -> Tensor:
        """int64 [K]: what the stones on `gone` (int8 [K, P], all bits or none), against `winner`, have in the hash."""
        return (self._keys.index_select(0, (winner < 0).long()) & gone).sum(1)

    def _repeating(self, boards: Boards, move: Tensor, seen: tuple[Tensor, ...]) -> Tensor:
        """Those of the moves (int64 [K], indices into all N * P) that bring back a position that is `seen`."""
        row = move // self.points
        point = move - row * self.points
        mover = boards.to_play.index_select(0, row)
        touched = self._touch(boards, row, point, mover)
        new = boards.hash.index_select(0, row) + self._key(point, mover) * (touched.stone != GONE)

        takes = touched.takes.nonzero()[:, 0]
        taking = _Touched(*(field.index_select(0, takes) for field in touched))
        chain = boards.chain.index_select(0, row.index_select(0, takes)).long()
        gone = self._marked(chain, taking).view(torch.int8) >> 7
        new.index_add_(0, takes, self._keys_gone(gone, taking.winner), alpha=-1)
        return torch.cat([move.index_select(0, self._found(new, row, old)) for old in seen])

    def _found(self, new: Tensor, row: Tensor, old: Tensor) -> Tensor:
        """Which of the hashes `new` [K] are among those in their `row` of `old` [N, L]."""
        if len(new) <= len(old):
            return (old.index_select(0, row) == new[:, None]).nonzero()[:, 0]
        # First in a table of what some bits of `old` are, a quarter full or less.
        bits = 2 ** (4 * old.shape[1] - 1).bit_length() - 1
        table = torch.zeros(len(old), bits + 1, dtype=torch.bool, device=self.device)
        table.scatter_(1, old >> COUNT.bit_length() & bits, True)
        maybe = table.view(-1).index_select(0, row * (bits + 1) + (new >> COUNT.bit_length() & bits)).nonzero()[:, 0]
        new, row = new.index_select(0, maybe), row.index_select(0, maybe)
        return maybe.index_select(0, (old.index_select(0, row) == new[:, None]).nonzero()[:, 0])

    def _all_repeating(self, boards: Boards, seen: tuple[Tensor, ...]) -> Tensor:
        """bool [N, P]: the moves that bring back a position that is `seen`; all at once, and the host need not wait."""
        mover, label = boards.to_play[:, None], boards.chain.long()
        side, atari, chain = (field[:, self._near] for field in (boards.stones * mover, boards.atari, label))
        breath = ((side == EMPTY) & self._beside) | ((side > 0) & ~atari) | ((side < 0) & atari)
        stays = breath.any(2)
        taken = torch.where(stays[:, :, None], (side < 0) & atari, side > 0)
        taken = torch.where(taken, chain, self._no_chain)  # [N, P, 4]
        keys = torch.zeros(len(label), self._no_chain + 1, dtype=torch.int64, device=self.device)
        keys.scatter_add_(1, label, self._keys_of(boards.stones))  # of each chain; the empty points have none
        new = boards.hash[:, None] + torch.where(stays, self._keys[(boards.to_play > 0).long()], 0)
        for d in range(len(SIDES)):
            twice = (taken[:, :, :d] == taken[:, :, d : d + 1]).any(2)
            new -= torch.where(twice, 0, keys.gather(1, taken[:, :, d]))
        nothing = torch.full_like(new[:, :1], self.NO_POSITION)  # so that there is something to look in
        old = torch.cat([nothing, *seen], 1).sort(1).values
        place = torch.searchsorted(old, new).clamp(max=old.shape[1] - 1)
        return old.gather(1, place) == new

    def _in_atari(self, stones: Tensor, chain: Tensor) -> Tensor:
        """bool [N, P]: the stones whose chain's first and last liberty are the same point. From `chain` int64 alone."""
        n = len(stones)
        liberty = (stones == EMPTY)[:, :, None] & self._beside
        chains = torch.where(liberty, chain[:, self._near], self._no_chain).reshape(n, -1)
        point = self._point.repeat_interleave(len(SIDES)).expand(n, -1)
        none = torch.full((n, self._no_chain + 1), -1, device=self.device)
        first = none.scatter_reduce(1, chains, point, "amin", include_self=False)
        last = none.scatter_reduce(1, chains, point, "amax", include_self=False)
        return (first == last).gather(1, chain) & (stones != EMPTY)
