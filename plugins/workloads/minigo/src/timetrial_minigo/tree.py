"""Search trees of many games in preallocated tensors: growth, descent, backup, and the change of roots.

A tree's nodes are slots, the root is slot 0; behind the nodes come H - 1 slots for the positions before the root, and
one for what is thrown away. Node (slot, game) is row `slot * G + game` of every tensor, so that one step's new nodes,
one for each game, lie in one stretch. The choice among a node's moves is made when the node's statistics change, not
when it is passed: `next` then points to the child that a descent would go to, or to the node itself where a descent
would end, and a descent of all games is one small gather for each level.

Letters: G games, K games at hand, F nodes at hand, M nodes of a tree, H positions of history, L length of a list of
earlier positions, D depth, P points, A moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from timetrial_minigo.go import Boards, Go
from timetrial_minigo.selection import Rule

OPEN, PENDING, OVER = 0, 1, 2
"""A node that the network has evaluated, that it has yet to evaluate, and a position that ends the game."""


@dataclass
class Descent:
    """One descent in each of K games."""

    games_K: Tensor
    path_DK: Tensor
    """Rows from the root on; where a game's descent ended early, its last node is repeated."""
    leaf_K: Tensor
    """The row where it ends: a new node, or an old one that is over or that waits for the network."""
    over_K: Tensor
    """bool: the leaf is the end of the game."""
    fresh_K: Tensor
    """bool: the leaf is new and for the network."""
    which_F: Tensor
    """int64: whose leaves the network is shown (on CUDA, everyone's); their rows, and their legal moves."""
    evaluate_F: Tensor
    legal_FA: Tensor
    rows_F: Tensor
    """All nodes on the way, `owner_F` says whose."""
    owner_F: Tensor


def rows_of(games: int, nodes: int, history: int) -> int:
    """Of the trees' tensors: the nodes, the H - 1 positions before each root, and what is thrown away."""
    return games * (nodes + history)


class Tree:
    """Trees of up to `games` games with `nodes` nodes each. `rule.table` has one row more than they."""

    def __init__(self, go: Go, rule: Rule, games: int, nodes: int, history: int) -> None:
        self.go, self.rule, self.games, self.nodes, self.history = go, rule, games, nodes, history
        rows, device = rows_of(games, nodes, history), go.device
        self.boards = Boards(*(f.new_zeros(rows, *f.shape[1:]) for f in go.start(1)))
        self.state = torch.zeros(rows, dtype=torch.int8, device=device)
        self.next = torch.zeros(rows, dtype=torch.int64, device=device)
        self.parent = torch.zeros(rows, dtype=torch.int64, device=device)
        self.best = torch.zeros(rows, dtype=torch.int64, device=device)
        self.width = rule.table.shape[1]
        self.nowhere = rule.table.shape[0] * self.width - self.width
        """Where the edges of roots point to: the table's last row, which no node has."""
        self.edge = torch.full((rows,), self.nowhere, dtype=torch.int64, device=device)
        """The first place in the rule's table of the move that leads here."""
        self.child = torch.zeros(rows, go.moves, dtype=torch.int32, device=device)
        """The row a move leads to, or the node's own where it has not been made."""
        self.visits = torch.zeros(rows, device=device)
        self.total = torch.zeros(rows, device=device)
        """Sum of values, as black sees them."""
        self.loss = torch.zeros(rows, device=device)
        """Virtual losses: descents under way through this node."""
        self.prior = torch.zeros(rows, device=device)
        self.mover = torch.zeros(rows, device=device)
        """1 where black made the move that leads here, else -1."""
        self.outcome = torch.zeros(rows, device=device)
        """Of a game that is over, as black sees it: 1, 0 or -1."""
        self.compacts = device.type == "cpu"

    # --------------------------------------------------------------------------------------------------- the roots

    def plant(self, boards: Boards, history_NHP: Tensor) -> None:
        """Trees of one node each, as many as there are boards."""
        self.games = len(boards.to_play)
        assert self.games <= self.capacity, "more games than the trees have room for"
        self._place(self.roots(), boards, torch.ones_like(boards.passes, dtype=torch.bool))
        self._surround(history_NHP)

    @property
    def capacity(self) -> int:
        """The most games."""
        return len(self.state) // (self.nodes + self.history)

    def roots(self) -> Tensor:
        return torch.arange(self.games, device=self.go.device)

    def select(self, rows: Tensor) -> Boards:
        return Boards(*(field.index_select(0, rows) for field in self.boards))

    def children(self, rows_K: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the children [K, A] (a node's own row where a move has not been made) and their visits (then 0)."""
        child = self.child.index_select(0, rows_K).long()
        made = child != rows_K[:, None]
        return child, self.visits.take(child) * made

    def _surround(self, history_NHP: Tensor) -> None:
        """What is not a node: edges of the roots, and positions before them (slot M + h is the one h + 1 moves before,
        and the parent of slot M + h - 1)."""
        below = self.roots()
        self.edge.index_fill_(0, below, self.nowhere)
        self.edge.index_fill_(0, self._thrown_away(below), self.nowhere)
        for h in range(1, self.history):
            rows = (self.nodes + h - 1) * self.games + self.roots()
            self.boards.stones.index_copy_(0, rows, history_NHP[:, h])
            self.parent.index_copy_(0, below, rows)
            below = rows
        self.parent.index_copy_(0, below, below)

    def _place(self, rows_F: Tensor, boards: Boards, real_F: Tensor) -> Tensor:
        """New nodes without children, their edges aside; which of them are over (of those that are `real`)."""
        for field, values in zip(self.boards, boards, strict=True):
            field.index_copy_(0, rows_F, values)
        over = self.go.ended(boards) & real_F
        self.state.index_copy_(0, rows_F, over.to(torch.int8) + PENDING)
        self.next.index_copy_(0, rows_F, rows_F)
        self.child.index_copy_(0, rows_F, rows_F[:, None].int().expand(-1, self.go.moves))
        for field in (self.visits, self.total, self.loss):
            field.index_fill_(0, rows_F, 0)
        self.mover.index_copy_(0, rows_F, -boards.to_play.float())
        if over.any():  # on CUDA, the host waits here
            ends = over.nonzero().squeeze(1)
            score = self.go.score(Boards(*(f.index_select(0, ends) for f in boards)))
            self.outcome.index_copy_(0, rows_F.index_select(0, ends), score.sign())
        return over

    # ----------------------------------------------------------------------------------------------------- descent

    def descend(self, games_K: Tensor, slot: int, seen_KL: Tensor) -> Descent:
        """To a leaf in each game, which becomes a node in `slot` where it is new. `seen` holds hashes of positions
        before the root."""
        path_DK = self._follow(games_K)
        last = path_DK[-1]
        own = slot * self.games + games_K
        grown = self.state.take(last) == OPEN
        which, parents, rows = self._narrow(grown, games_K, last, own)
        real = grown.index_select(0, which)
        action = torch.where(real, self.best.take(parents), self.go.points)  # what is thrown away passes
        boards = self.go.play(self.select(parents), action)
        over = self._place(rows, boards, real)
        edge = parents * self.width + action
        prior, first = self.rule.enter(edge)
        self.prior.index_copy_(0, rows, prior)
        self.total.index_copy_(0, rows, first * self.mover.take(rows))
        self.edge.index_copy_(0, rows, edge)
        self.parent.index_copy_(0, rows, parents)
        self.child.view(-1).index_copy_(0, parents * self.go.moves + action, rows.int())
        leaf = torch.where(grown, own, last)
        hashes = self.boards.hash.take(path_DK).T
        if len(which) < len(games_K):
            seen_KL = seen_KL.index_select(0, which)
            hashes = hashes.index_select(0, which)
        legal = self.go.legal(boards, seen_KL, hashes)
        keep, evaluate, _ = self._narrow(~over, games_K.index_select(0, which), rows, rows)
        if len(keep) < len(which):
            legal, which = legal.index_select(0, keep), which.index_select(0, keep)
        rows_F, owner_F = self._visited(games_K, path_DK, leaf)
        over_K = self.state.take(leaf) == OVER
        return Descent(games_K, path_DK, leaf, over_K, grown & ~over_K, which, evaluate, legal, rows_F, owner_F)

    def _follow(self, games_K: Tensor) -> Tensor:
        """On CUDA, the host waits once a level."""
        path = [games_K]
        while True:
            onward = self.next.take(path[-1])
            if torch.equal(onward, path[-1]):
                return torch.stack(path)
            path.append(onward)

    def _visited(self, games_K: Tensor, path_DK: Tensor, leaf_K: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes on the way and whose they are, each node once; on CUDA padded with the row that is thrown away."""
        steps = torch.cat([path_DK, leaf_K[None]])
        new = torch.ones_like(steps, dtype=torch.bool)
        torch.ne(steps[1:], steps[:-1], out=new[1:])
        owner = torch.arange(len(games_K), device=games_K.device).expand(len(steps), -1).flatten()
        if self.compacts:
            at = new.flatten().nonzero().squeeze(1)
            return steps.flatten().index_select(0, at), owner.index_select(0, at)
        return torch.where(new, steps, self._thrown_away(games_K)).flatten(), owner

    def _narrow(self, mask_K: Tensor, games_K: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which of the K games are meant, and their rows. On CUDA, where counting would make the host wait, all of
        them, with the rows of the others sent to where they are thrown away."""
        first, second = rows
        everyone = torch.arange(len(games_K), device=games_K.device)
        if not self.compacts:
            nowhere = self._thrown_away(games_K)
            return everyone, torch.where(mask_K, first, nowhere), torch.where(mask_K, second, nowhere)
        if mask_K.all():
            return everyone, first, second
        which = mask_K.nonzero().squeeze(1)
        return which, first.index_select(0, which), second.index_select(0, which)

    def _thrown_away(self, games_K: Tensor) -> Tensor:
        return (self.nodes + self.history - 1) * self.games + games_K

    def stones(self, rows_F: Tensor) -> Tensor:
        """int8 [F, H, P]: the last positions, most recent first."""
        line = [rows_F]
        for _ in range(self.history - 1):
            line.append(self.parent.take(line[-1]))
        rows = torch.stack(line, 1).flatten()
        return self.boards.stones.index_select(0, rows).view(len(rows_F), self.history, -1)

    # ------------------------------------------------------------------------------------------------------ backup

    def evaluated(self, rows_F: Tensor, logits_FA: Tensor, value_F: Tensor, legal_FA: Tensor) -> None:
        """The network's word on new nodes (value: for the player to move)."""
        self.rule.open(rows_F, logits_FA, value_F, legal_FA)
        self.state.index_fill_(0, rows_F, OPEN)

    def credit(self, rows_F: Tensor, visits_F: Tensor | float, value_F: Tensor, loss_F: Tensor | None) -> None:
        """Adds to the visits, the values (as black sees them) and the virtual losses of nodes, each listed once."""
        visits, total = self.visits.take(rows_F).add_(visits_F), self.total.take(rows_F).add_(value_F)
        self.visits.index_copy_(0, rows_F, visits)
        self.total.index_copy_(0, rows_F, total)
        total = total * self.mover.take(rows_F)
        if loss_F is not None:
            loss = self.loss.take(rows_F).add_(loss_F)
            self.loss.index_copy_(0, rows_F, loss)
            total -= loss
        self.rule.update(self.edge.take(rows_F), visits, total, self.prior.take(rows_F))

    def refresh(self, rows_F: Tensor) -> None:
        """Chooses anew among the moves of nodes."""
        self.point(rows_F, self.rule.choose(rows_F, self.visits.take(rows_F)))

    def point(self, rows_F: Tensor, action_F: Tensor) -> None:
        self.best.index_copy_(0, rows_F, action_F)
        self.next.index_copy_(0, rows_F, self.child.view(-1).take(rows_F * self.go.moves + action_F).long())

    # ---------------------------------------------------------------------------------------------- change of roots

    def rebase(
        self, heads_K: Tensor, games_K: Tensor, boards: Boards, history_KHP: Tensor, used: int, room: int
    ) -> int:
        """Trees of K of the games, each with the node `heads` for its root and all that lies below it. A game starts
        anew, from `boards`, where its head is the row of another game (-1) or more than `room` nodes would be left.

        `used` slots have been in use; returned is how many are now. The host waits for that number.
        """
        inside = self._below(heads_K, games_K, used)
        left = inside.sum(0)
        inside &= left <= room
        left = inside.sum(0)
        now = max(1, int(left.max()))
        slot, place = inside.nonzero(as_tuple=True)
        source = slot * self.games + games_K[place]
        target = (inside.cumsum(0) - 1)[slot, place] * len(games_K) + place
        moved = torch.zeros(len(self.state), dtype=torch.int64, device=self.go.device)
        moved[source] = target
        action = (self.edge[source] - self.parent[source] * self.width).clamp(0, self.go.moves - 1)
        parent = moved[self.parent[source]]
        fields = (self.state, self.best, self.visits, self.total, self.prior, self.mover, self.outcome)
        for field in (*fields, self.rule.table, *self.boards):
            field.index_copy_(0, target, field[source])
        self.games = len(games_K)
        rows = torch.arange(now * self.games, device=self.go.device)
        self.child[rows] = rows[:, None].int()
        self.next[rows] = self.parent[rows] = rows  # also of slots that a smaller tree leaves empty
        below = target >= self.games
        target, parent, action = target[below], parent[below], action[below]
        self.parent[target], self.edge[target] = parent, parent * self.width + action
        self.child.view(-1)[parent * self.go.moves + action] = target.int()
        self.next[rows] = self.child.view(-1)[rows * self.go.moves + self.best[rows]].long()
        anew = (left == 0).nonzero().squeeze(1)
        if len(anew):
            self._place(anew, Boards(*(f[anew] for f in boards)), torch.ones_like(anew, dtype=torch.bool))
        self._surround(history_KHP)
        return now

    def _below(self, heads_K: Tensor, games_K: Tensor, used: int) -> Tensor:
        """bool [used, K]: the nodes of the trees below (and with) each head, by doubling the steps towards the root."""
        rows = torch.arange(used * self.games, device=self.go.device)
        parent = self.parent[rows]
        action = (self.edge[rows] - parent * self.width).clamp(0, self.go.moves - 1)
        linked = self.child.view(-1)[parent * self.go.moves + action] == rows  # not so a slot that is not in use
        up = torch.where(linked & (rows >= self.games), parent, rows)
        made = heads_K >= 0
        up[heads_K[made]] = heads_K[made]
        for _ in range(used.bit_length()):
            up = up[up]
        return up.view(used, self.games)[:, games_K] == heads_K
