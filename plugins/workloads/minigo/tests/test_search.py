"""Batched search against a plain one: rules, PUCT and Gumbel MCTS of one game, written from their sources as directly
as Python allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from timetrial_minigo.features import planes, symmetries
from timetrial_minigo.go import BLACK, WHITE, Boards, Go, Rules
from timetrial_minigo.search import Search, SearchSettings, draw_noise

pytestmark = pytest.mark.numbers

HISTORY = 3
f32 = np.float32
ZERO = f32(0)


# --------------------------------------------------------------------------------------------------- plain rules


@dataclass(frozen=True)
class Position:
    boards: tuple[tuple[int, ...], ...]
    """All positions of the game, most recent first."""
    to_play: int
    passes: int


class PlainGo:
    def __init__(self, rules: Rules) -> None:
        self.rules, self.points = rules, rules.size**2
        self.bans = 0
        """How often superko forbade a move."""

    def near(self, point: int) -> list[int]:
        size, (row, column) = self.rules.size, divmod(point, self.rules.size)
        steps = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
        return [r * size + c for r, c in steps if 0 <= r < size and 0 <= c < size]

    def region(self, board: list[int], point: int) -> tuple[set[int], set[int]]:
        """The points of one colour that hang together, and the colours that they touch."""
        region, edge, todo = {point}, set[int](), [point]
        while todo:
            for other in self.near(todo.pop()):
                if board[other] != board[point]:
                    edge.add(board[other])
                elif other not in region:
                    region.add(other)
                    todo.append(other)
        return region, edge

    def after(self, position: Position, move: int) -> Position | None:
        """None where the move is not legal."""
        if move == self.points:
            return Position(position.boards[:1] + position.boards, -position.to_play, position.passes + 1)
        board = list(position.boards[0])
        if board[move]:
            return None
        board[move] = position.to_play
        for other in self.near(move):
            if board[other] == -position.to_play:
                self._take(board, other)
        chain, edge = self.region(board, move)
        if 0 not in edge:
            if not self.rules.suicide or len(chain) == 1:
                return None
            self._take(board, move)
        if tuple(board) in position.boards:
            self.bans += 1
            return None
        return Position((tuple(board), *position.boards), -position.to_play, 0)

    def _take(self, board: list[int], point: int) -> None:
        chain, edge = self.region(board, point)
        if 0 not in edge:
            for stone in chain:
                board[stone] = 0

    def outcome(self, position: Position) -> int:
        board, score = list(position.boards[0]), -self.rules.komi
        for point in range(self.points):
            owners = {board[point]} if board[point] else self.region(board, point)[1]
            score += sum(owners) if len(owners) == 1 else 0
        return (score > 0) - (score < 0)


# -------------------------------------------------------------------------------------------------- plain search


@dataclass
class Node:
    position: Position
    prior: f32 = ZERO
    total: f32 = ZERO
    """Values, as black sees them."""
    visits: int = 0
    losses: int = 0
    open: bool = False
    moves: dict[int, Position] = field(default_factory=dict)
    """The legal ones, where they lead."""
    logits: Tensor | None = None
    priors: np.ndarray | None = None
    value: f32 = ZERO
    children: dict[int, Node] = field(default_factory=dict)

    @property
    def sign(self) -> int:
        return self.position.to_play

    def size(self) -> int:
        return 1 + sum(child.size() for child in self.children.values())


class PlainSearch:
    def __init__(self, go: PlainGo, settings: SearchSettings, evaluate: Callable, position: Position) -> None:
        self.go, self.settings, self.evaluate = go, settings, evaluate
        self.root = Node(position)
        self.ends = self.claimed_twice = 0

    # What both methods share.

    def run(self, noise: np.ndarray | None, turns: list[int] | None = None) -> None:
        self.noise, self.turns = noise, turns or [0] * self.settings.simulations
        known = self.root.open
        if known:
            self.mix()
        self.round([self.turns[0]])
        if not known:
            self.mix()
        for first in range(1, self.settings.simulations, self.settings.leaves):
            self.round(self.turns[first : first + self.settings.leaves])

    def round(self, turns: list[int]) -> None:
        waiting = []
        for turn in turns:
            path = self.descend()
            leaf = path[-1]
            if leaf.position.passes == 2:
                self.ends += 1
                for node in path:
                    node.visits += 1
                    node.total = f32(node.total + f32(self.go.outcome(leaf.position)))
            else:
                for node in path:
                    node.losses += len(turns) > 1
                waiting.append((path, turn))
        for path, turn in waiting:
            leaf, new = path[-1], not path[-1].open
            if new:
                self.open(leaf, turn)
            self.claimed_twice += not new
            for node in path:
                node.losses -= len(turns) > 1
                if new:
                    node.visits += 1
                    node.total = f32(node.total + f32(leaf.value * leaf.sign))

    def descend(self) -> list[Node]:
        path = [self.root]
        while path[-1].open:
            node = path[-1]
            move = self.choose(node)
            if move not in node.children:
                node.children[move] = self.child(node, move)
            path.append(node.children[move])
        return path

    def open(self, node: Node, turn: int) -> None:
        go, position = self.go, node.position
        boards = [*position.boards[:HISTORY], *[(0,) * go.points] * HISTORY][:HISTORY]
        image = symmetries(go.rules.size)[turn]
        stones = torch.tensor(boards, dtype=torch.int8)[:, image]
        to_play = torch.tensor([position.to_play], dtype=torch.int8)
        logits, value = self.evaluate(planes(stones[None], to_play, go.rules.size))
        node.logits = torch.empty_like(logits[0])
        node.logits[image], node.logits[go.points] = logits[0, : go.points], logits[0, go.points]
        node.moves = {m: p for m in range(go.points + 1) if (p := go.after(position, m)) is not None}
        barred = torch.full_like(node.logits, -math.inf)
        barred[list(node.moves)] = 0
        node.logits = node.logits + barred
        node.priors, node.value, node.open = torch.softmax(node.logits, 0).numpy(), f32(value[0]), True

    def visits(self) -> list[int]:
        children = self.root.children
        return [children[m].visits if m in children else 0 for m in range(self.go.points + 1)]

    def advance(self, move: int) -> None:
        child, settings = self.root.children.get(move), self.settings
        if settings.reuse and child is not None and child.size() <= settings.room - settings.simulations:
            self.root = child
        else:
            self.root = Node(self.go.after(self.root.position, move))


class PlainPuct(PlainSearch):
    def child(self, node: Node, move: int) -> Node:
        first = f32(min(max(node.value - self.settings.value_init_penalty, -1), 1)) * node.sign
        return Node(node.moves[move], node.priors[move], first)

    def choose(self, node: Node) -> int:
        s, n = self.settings, f32(node.visits)
        c = 2 * (np.log1p((1 + n) / f32(s.c_puct_base)) + f32(s.c_puct_init)) * np.sqrt(max(f32(1), n - 1))

        def score(move: int) -> f32:
            child = node.children.get(move) or self.child(node, move)
            count = f32(1 + child.visits)
            return (child.total * node.sign - f32(child.losses)) / count + c * (child.prior / count)

        return max(node.moves, key=score)

    def mix(self) -> None:
        root, share = self.root, f32(self.settings.noise_fraction)
        if self.noise is None or not root.moves:
            return
        noise = np.array([self.noise[m] if m in root.moves else 0 for m in range(len(self.noise))], f32)
        noise = noise / noise.sum()
        root.priors = (1 - share) * root.priors + share * noise
        for move, child in root.children.items():
            child.prior = root.priors[move]

    def value(self) -> float:
        return float(self.root.total) * self.root.sign / (1 + self.root.visits)

    def policy(self) -> np.ndarray:
        return np.array(self.visits()) / max(1, sum(self.visits()))


class PlainGumbel(PlainSearch):
    """One game's Gumbel MCTS. Sequential halving is written out here, as rounds over a list of moves that shrinks."""

    def child(self, node: Node, move: int) -> Node:
        return Node(node.moves[move], node.priors[move])

    def mix(self) -> None:
        self.gumbel = np.zeros(self.go.points + 1, f32) if self.noise is None else self.noise
        if self.root.open and not self.root.children:
            self.agenda = self.halving()

    def halving(self) -> Iterator[int]:
        budget, moves = self.settings.simulations - 1, list(self.root.moves)
        count = min(len(moves), self.settings.considered)
        phases = max(1, math.ceil(math.log2(count)))
        while True:
            for _ in range(max(1, budget // (phases * count))):
                picked = list[int]()
                while len(picked) < count:
                    picked.append(max((m for m in moves if m not in picked), key=self.rank))
                    yield picked[-1]
                moves = picked
            count = min(count, max(2, count // 2))

    def rank(self, move: int) -> float:
        return float(self.root.logits[move] + f32(self.gumbel[move]) + self.gain(self.root)[move])

    def gain(self, node: Node) -> Tensor:
        """sigma(completed Q) for all moves."""
        n = torch.tensor([float(node.children[m].visits if m in node.children else 0) for m in range(len(node.priors))])
        q = torch.zeros(len(n))
        for move, child in node.children.items():
            q[move] = float(child.total) * node.sign / max(1, child.visits)
        seen, prior = (n > 0).float(), torch.from_numpy(node.priors)
        mixed = torch.tensor(node.value)
        if n.sum() > 0:
            mixed = (mixed + n.sum() * (seen * prior * q).sum() / (seen * prior).sum()) / (1 + n.sum())
        completed = torch.where(seen > 0, q, mixed)
        return (self.settings.c_visit + n.max()) * self.settings.c_scale * (completed + 1) / 2

    def choose(self, node: Node) -> int:
        if node is self.root:
            return next(self.agenda)
        n = [float(node.children[m].visits if m in node.children else 0) for m in range(len(node.priors))]
        improved = torch.softmax(node.logits + self.gain(node), 0)
        return max(node.moves, key=lambda m: float(improved[m]) - n[m] / (1 + sum(n)))

    def value(self) -> float:
        return float(self.root.total) * self.root.sign / max(1, self.root.visits)

    def policy(self) -> np.ndarray:
        return torch.softmax(self.root.logits + self.gain(self.root), 0).numpy()


# ------------------------------------------------------------------------------------------------------- parts


def evaluator(size: int, history: int = HISTORY, seed: int = 0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Arbitrary logits and values that are a function of the planes, in exact arithmetic: the same in any batch."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 10007, ((2 * history + 1) * size**2, size**2 + 2), generator=draw)

    def evaluate(seen: Tensor) -> tuple[Tensor, Tensor]:
        mixed = (seen.flatten(1).long() @ weights) % 10007 / 10007
        return 3 * mixed[:, :-1], 1.6 * mixed[:, -1] - 0.8

    return evaluate


def uniform(seen: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(seen), seen.shape[2] * seen.shape[3] + 1), torch.zeros(len(seen))


def openings(go: Go, games: int, moves: int, seed: int) -> list[list[int]]:
    """Random moves that are legal and do not end the game."""
    random, rules = np.random.default_rng(seed), PlainGo(go.rules)
    lines = []
    for _ in range(games):
        position, line = plain_root(rules, []), []
        for _ in range(random.integers(0, moves + 1)):
            legal = [m for m in range(go.points) if rules.after(position, m) is not None]
            line.append(int(random.choice(legal)) if legal else go.points)
            position = rules.after(position, line[-1])
        lines.append(line)
    return lines


def plant(search: Search, go: Go, lines: list[list[int]], history: int = HISTORY) -> None:
    """Roots after the moves of each line."""
    boards, stones, seen = [], [], []
    for line in lines:
        games = [go.start(1)]
        for move in line:
            games.append(go.play(games[-1], torch.tensor([move])))
        boards.append(games[-1])
        hashes = [game.hash for game in games] + [torch.tensor([Go.NO_POSITION])] * max(len(x) for x in lines)
        seen.append(torch.cat(hashes[: 1 + max(len(x) for x in lines)]))
        past = [game.stones for game in reversed(games)] + [torch.zeros_like(games[0].stones)] * history
        stones.append(torch.stack(past[:history], 1))
    search.root(
        Boards(*(torch.cat(field) for field in zip(*boards, strict=True))), torch.cat(stones), torch.stack(seen)
    )


def plain_root(go: PlainGo, line: list[int]) -> Position:
    position = Position(((0,) * go.points,), BLACK, 0)
    for move in line:
        position = go.after(position, move)
        assert position is not None
    return position


# ------------------------------------------------------------------------------ the batched search is the plain one


@dataclass
class Case:
    size: int
    komi: float
    settings: dict[str, Any]
    noisy: bool = True
    turned: bool = False
    suicide: bool = False
    opening: int = 4
    moves: int = 6
    games: int = 4
    superko: bool = False
    """Whether superko must have come up, and the ends of games."""


def compare(case: Case) -> tuple[int, int, int]:
    """Plays games with the plain search and with the batched one, as it works on a CPU and with the fixed shapes of a
    GPU. Returned is how often superko forbade a move, a game ended in a tree, and a leaf was claimed twice."""
    go = Go(Rules(case.size, case.komi, case.suicide))
    settings, evaluate = SearchSettings(**{"simulations": 24} | case.settings), evaluator(case.size)
    lines = openings(go, case.games, case.opening, seed=case.size)
    searches = [Search(go, settings, evaluate, case.games, HISTORY) for _ in range(2)]
    searches[1].tree.compacts = False
    for search in searches:
        plant(search, go, lines)
    rules = PlainGo(go.rules)
    kind = PlainPuct if settings.method == "puct" else PlainGumbel
    plain = everyone = [kind(rules, settings, evaluate, plain_root(rules, line)) for line in lines]
    draw = torch.Generator().manual_seed(1)
    for move in range(case.moves):
        noise = draw_noise(settings, len(plain), go.points, move) if case.noisy else None
        turns = torch.randint(0, 8, (settings.simulations, len(plain)), generator=draw) if case.turned else None
        for game, one in enumerate(plain):
            one.run(None if noise is None else noise[game].numpy(), None if turns is None else turns[:, game].tolist())
        for search in searches:
            search.run(noise=noise, symmetry=turns)
            for game, one in enumerate(plain):
                assert search.visits[game].tolist() == one.visits(), f"game {game}, move {move}"
                assert search.value[game].item() == pytest.approx(one.value(), abs=1e-5)
                assert search.policy[game].numpy() == pytest.approx(one.policy(), abs=1e-5)
            best = search.best
            search.advance(best)
        for one, chosen in zip(plain, best.tolist(), strict=True):
            one.advance(chosen)
        running = (~go.ended(search.boards)).nonzero().squeeze(1)
        if len(running) < len(plain):
            plain = [plain[game] for game in running]
            for search in searches:
                search.keep(running)
    return rules.bans, sum(one.ends for one in everyone), sum(one.claimed_twice for one in everyone)


CASES = {
    "no noise": Case(3, 0.5, {}, noisy=False, superko=True, games=6),
    "noise": Case(4, 0.5, {}),
    "a penalty": Case(4, 1.0, {"value_init_penalty": 0.3}),
    "no penalty": Case(5, 1.0, {"value_init_penalty": 0.0}),
    "suicide": Case(3, 0.5, {}, suicide=True, moves=12, superko=True, games=6),
    "reuse": Case(3, 0.5, {"reuse": True, "nodes": 400}, moves=12, superko=True, games=6),
    "reuse, as far as there is room": Case(4, 0.5, {"reuse": True, "nodes": 32, "value_init_penalty": 0.0}, moves=8),
    "virtual losses": Case(4, 0.5, {"leaves": 3}),
    "virtual losses and reuse": Case(3, 0.0, {"leaves": 6, "reuse": True}, moves=12, superko=True, games=6),
    "symmetries": Case(4, 0.5, {"leaves": 2, "reuse": True}, turned=True),
    "more exploration": Case(4, 0.5, {"c_puct_base": 5.0, "c_puct_init": 2.0, "noise_fraction": 0.5}),
    "calls in parts": Case(4, 0.5, {"network_batch": 5}),
    "gumbel": Case(4, 0.5, {"method": "gumbel"}),
    "gumbel, few moves": Case(
        3, 0.5, {"method": "gumbel", "considered": 4, "c_scale": 0.1}, moves=12, superko=True, games=6
    ),
    "gumbel, without noise": Case(5, 0.5, {"method": "gumbel", "simulations": 50}, noisy=False, moves=2),
}


@pytest.mark.parametrize("name", CASES)
def test_visits_values_and_policies_are_those_of_a_plain_search(name: str):
    case = CASES[name]
    bans, ends, claimed_twice = compare(case)
    assert not case.superko or (bans > 0 and ends > 0)
    assert name != "virtual losses and reuse" or claimed_twice > 0


# --------------------------------------------------------------------------------------- what one may expect of it


@pytest.mark.parametrize("method", ["puct", "gumbel"])
@pytest.mark.parametrize("mover", [BLACK, WHITE])
@pytest.mark.parametrize("size", [3, 4, 5])
def test_the_capture_that_decides_the_game_is_found_without_a_network(size: int, mover: int, method: str):
    """The mover owns the board but for a stone in a corner, whose last liberty it must take: then the other side can
    but pass. With any other move the stone lives on, and the komi decides against the mover."""
    stones = torch.full((size, size), mover, dtype=torch.int8)
    stones[0, 0] = stones[1, size - 1] = 0
    stones[0, size - 1] = -mover
    go = Go(Rules(size, komi=mover * (size**2 - 1.5)))
    boards = go.from_stones(stones.view(1, -1), torch.tensor([mover], dtype=torch.int8))
    search = Search(go, SearchSettings(simulations=64, method=method), uniform, 1, HISTORY)
    search.root(boards, boards.stones[:, None].expand(-1, HISTORY, -1).contiguous(), boards.hash[:, None])
    search.run()
    assert search.best.item() == search.policy.argmax().item() == 2 * size - 1
    assert search.value.item() > (0.5 if method == "puct" else 0)  # half of Gumbel's visits go to another move


@pytest.mark.parametrize("settings", [{}, {"leaves": 3, "reuse": True}, {"method": "gumbel"}], ids=str)
def test_a_game_is_searched_alike_whatever_is_searched_beside_it(settings: dict[str, Any]):
    go, games = Go(Rules(4, 0.5)), 9
    settings = SearchSettings(simulations=24, **settings)
    lines = openings(go, games, 5, seed=2)
    noise = [draw_noise(settings, games, go.points, move) for move in range(4)]

    def play(some: list[int]) -> list[Tensor]:
        search, found = Search(go, settings, evaluator(4), len(some), HISTORY), []
        plant(search, go, [lines[game] for game in some])
        for draw in noise:
            search.run(noise=draw[some])
            found += [search.visits, search.policy, search.value[:, None]]
            search.advance(search.best)
        return found

    together, chosen = play(list(range(games))), [7, 2, 5]
    for alone, all_of_them in zip(play(chosen), together, strict=True):
        assert torch.equal(alone, all_of_them[chosen])


def test_games_can_be_given_different_numbers_of_simulations():
    go, settings = Go(Rules(4, 0.5)), SearchSettings(simulations=24)
    lines, noise = openings(go, 6, 5, seed=3), draw_noise(SearchSettings(), 6, go.points, 0)
    few, many = torch.tensor([0, 3, 4]), torch.tensor([5, 1, 2])
    search, other = (Search(go, settings, evaluator(4), 6, HISTORY) for _ in range(2))
    plant(search, go, lines)
    search.run(8, games=few)
    search.run(games=many, noise=noise[many])
    assert search.visits.sum(1).tolist() == [7, 23, 23, 7, 7, 23]
    plant(other, go, lines)
    other.run(8)
    assert torch.equal(search.visits[few], other.visits[few])
    plant(other, go, lines)
    other.run(noise=noise)
    assert torch.equal(search.visits[many], other.visits[many])


def test_each_simulation_shows_the_network_one_new_position():
    go, shown = Go(Rules(5, 0.5)), []

    def evaluate(seen: Tensor) -> tuple[Tensor, Tensor]:
        shown.append(len(seen))
        return evaluator(5)(seen)

    search = Search(go, SearchSettings(simulations=16, leaves=4), evaluate, 3, HISTORY)
    plant(search, go, [[], [], []])
    search.run()
    assert shown[0] == 3 and len(shown) == 1 + math.ceil(15 / 4)
    assert search.tree.visits[:3].tolist() == [sum(shown) / 3] * 3


def test_gumbel_policies_are_better_than_the_prior_by_the_networks_own_values():
    """All moves are tried once, so the value of each is known: policies are compared by their expected value."""
    go, evaluate = Go(Rules(4, 0.5)), evaluator(4)
    settings = SearchSettings(simulations=18, method="gumbel", considered=17)
    search = Search(go, settings, evaluate, 40, HISTORY)
    plant(search, go, openings(go, 40, 4, seed=4))
    search.run(noise=draw_noise(settings, 40, go.points, 0))
    boards = search.boards
    legal = go.legal(boards, search.seen)
    after = [go.play(boards, torch.full((40,), move)) for move in range(go.moves)]
    values = []
    for child in after:
        stones = torch.cat([child.stones[:, None], search.history[:, :-1]], 1)
        values.append(-evaluate(planes(stones, child.to_play, 4))[1])
    q = torch.stack(values, 1)
    prior = torch.softmax(evaluate(planes(search.history, boards.to_play, 4))[0].masked_fill(~legal, -math.inf), 1)
    gain = ((search.policy - prior) * q).sum(1)
    assert (search.visits > 0).sum() > 0.9 * legal.sum()
    assert (gain > 0).all()
    best_q = q.masked_fill(~legal, -2).amax(1)
    assert (search.policy * q).sum(1).mean() > (0.8 * best_q + 0.2 * (prior * q).sum(1)).mean()


def test_gumbel_without_search_budget_for_all_moves_still_improves_on_the_prior_on_average():
    go, evaluate = Go(Rules(5, 0.5)), evaluator(5)
    settings = SearchSettings(simulations=9, method="gumbel", considered=8)
    search = Search(go, settings, evaluate, 200, HISTORY)
    plant(search, go, openings(go, 200, 4, seed=5))
    search.run(noise=draw_noise(settings, 200, go.points, 0))
    boards, best = search.boards, search.best
    child = go.play(boards, best)
    stones = torch.cat([child.stones[:, None], search.history[:, :-1]], 1)
    chosen = -evaluate(planes(stones, child.to_play, 5))[1]
    assert (chosen.mean() - search.value.mean()) > 0.3


def test_noise_is_a_function_of_its_seed_and_leaves_the_priors_a_distribution():
    settings = SearchSettings()
    noise = draw_noise(settings, 4, 25, seed=6)
    assert torch.equal(noise, draw_noise(settings, 4, 25, seed=6))
    assert not torch.equal(noise, draw_noise(settings, 4, 25, seed=7))
    assert torch.allclose(noise.sum(1), torch.ones(4))
    go = Go(Rules(5, 0.5))
    search = Search(go, settings, evaluator(5), 4, HISTORY)
    plant(search, go, openings(go, 4, 4, seed=6))
    search.run(1, noise=noise)
    prior = search.puct.table[:4, go.moves :]
    legal = go.legal(search.boards, search.seen)
    assert torch.allclose(prior.sum(1), torch.ones(4)) and (prior[~legal] == 0).all()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"simulations": 0}, "at least 1"),
        ({"method": "gumbel", "leaves": 2}, "leaves=1"),
        ({"reuse": True, "nodes": 64}, "nodes=64"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        SearchSettings(**wrong)


def test_more_simulations_than_there_is_room_for_are_refused():
    go = Go(Rules(3, 0.5))
    search = Search(go, SearchSettings(simulations=8), uniform, 1, HISTORY)
    plant(search, go, [[]])
    search.run()
    with pytest.raises(ValueError, match="room for 0"):
        search.run()
