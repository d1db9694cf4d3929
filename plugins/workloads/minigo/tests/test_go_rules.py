"""The rules, against a plain reference on one board, and on shapes that every player knows.

Points are (row, column) from the top left; X is black, O white.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timetrial_minigo.go import BLACK, COUNT, WHITE, Boards, Go, Rules

Point = tuple[int, int]
ENGINES = {(size, suicide): Go(Rules(size, 0.5, suicide)) for size in range(2, 20) for suicide in (False, True)}


class Plain:
    """One game, in plain words: `stones` maps points to colours, `earlier` has all positions of the game so far."""

    def __init__(self, size: int, suicide: bool, stones: dict[Point, int] | None = None, to_play: int = BLACK) -> None:
        self.size, self.suicide, self.stones, self.to_play = size, suicide, dict(stones or {}), to_play
        self.earlier = [dict(self.stones)]

    def near(self, point: Point) -> list[Point]:
        row, column = point
        around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        return [(r, c) for r, c in around if 0 <= r < self.size and 0 <= c < self.size]

    def region(self, start: Point, stones: dict[Point, int]) -> tuple[set[Point], set[Point]]:
        """All points of one colour (or none) that hang together with `start`, and the other points beside them."""
        region, beside, frontier = {start}, set[Point](), [start]
        while frontier:
            for point in self.near(frontier.pop()):
                if stones.get(point) != stones.get(start):
                    beside.add(point)
                elif point not in region:
                    region.add(point)
                    frontier.append(point)
        return region, beside

    def has_liberty(self, start: Point, stones: dict[Point, int]) -> bool:
        return any(point not in stones for point in self.region(start, stones)[1])

    def after(self, point: Point) -> dict[Point, int] | None:
        """The stones after a stone at an empty point; None where that is suicide and suicide is forbidden."""
        stones = {**self.stones, point: self.to_play}
        for other in self.near(point):
            if stones.get(other) == -self.to_play and not self.has_liberty(other, stones):
                stones = {p: c for p, c in stones.items() if p not in self.region(other, stones)[0]}
        if not self.has_liberty(point, stones):
            if not self.suicide:
                return None
            stones = {p: c for p, c in stones.items() if p not in self.region(point, stones)[0]}
        return stones

    def is_legal(self, point: Point) -> bool:
        return point not in self.stones and self.after(point) not in (None, *self.earlier)

    def play(self, point: Point | None) -> None:
        if point is not None:
            self.stones = self.after(point) or {}
        self.earlier.append(dict(self.stones))
        self.to_play = -self.to_play

    def owner(self, point: Point) -> int:
        region, beside = self.region(point, self.stones)
        colours = {self.stones.get(p, 0) for p in region | beside} - {0}
        return self.stones.get(point) or (colours.pop() if len(colours) == 1 else 0)


class Game:
    """The same game on a board of ours and on a plain one, which `play` compares.

    `symmetry` (0 to 7) and `swapped` say how the drawing is turned, mirrored and recoloured; points are the drawing's.
    """

    def __init__(
        self, rows: str, size: int, suicide: bool = False, corner: Point = (0, 0), symmetry: int = 0,
        swapped: bool = False,
    ) -> None:  # fmt: skip
        self.size, self.corner, self.symmetry, self.sign = size, corner, symmetry, -1 if swapped else 1
        drawn = {
            (r, c): {"X": BLACK, "O": WHITE}.get(s) for r, row in enumerate(rows.split()) for c, s in enumerate(row)
        }
        stones = {self.at(point): self.sign * colour for point, colour in drawn.items() if colour}
        self.plain = Plain(size, suicide, stones, self.sign * BLACK)
        self.go = ENGINES[size, suicide]
        plane = torch.tensor([[stones.get((row, column), 0) for row in range(size) for column in range(size)]])
        self.boards = self.go.from_stones(plane, torch.tensor([self.sign * BLACK]))
        self.seen = [self.boards.hash]
        self.compare()

    def at(self, point: Point) -> Point:
        """Where a point of the drawing is on the board."""
        row, column = point[0] + self.corner[0], point[1] + self.corner[1]
        if self.symmetry & 1:
            row = self.size - 1 - row
        if self.symmetry & 2:
            column = self.size - 1 - column
        return (column, row) if self.symmetry & 4 else (row, column)

    def play(self, *moves: Point | None) -> Game:
        for move in moves:
            point = None if move is None else self.at(move)
            assert move is None or self.allows(move), f"{move} is not legal"
            number = self.go.points if point is None else point[0] * self.size + point[1]
            self.plain.play(point)
            self.boards = self.go.play(self.boards, torch.tensor([number]))
            self.seen.append(self.boards.hash)
            self.compare()
        return self

    def compare(self) -> None:
        empty = torch.zeros(self.size, self.size, dtype=torch.int8)
        stones, owner, legal = empty.clone(), empty.clone(), empty.bool()
        for row in range(self.size):
            for column in range(self.size):
                stones[row, column] = self.plain.stones.get((row, column), 0)
                owner[row, column] = self.plain.owner((row, column))
                legal[row, column] = self.plain.is_legal((row, column))
        assert torch.equal(self.boards.stones[0], stones.view(-1))
        assert self.boards.to_play[0] == self.plain.to_play
        assert torch.equal(self.go.owner(self.boards)[0], owner.view(-1))
        assert self.go.score(self.boards)[0] == owner.sum() - 0.5
        if not self.go.ended(self.boards)[0]:
            assert torch.equal(self.go.legal(self.boards, torch.stack(self.seen, 1))[0, :-1], legal.view(-1))

    def allows(self, move: Point, seen: list[Tensor] | None = None) -> bool:
        """Is the move legal, after the positions of this game unless others are given."""
        row, column = self.at(move)
        past = self.seen if seen is None else seen
        return bool(self.go.legal(self.boards, *(h[:, None] for h in past))[0, row * self.size + column])

    def stones(self, colour: str) -> int:
        return int((self.boards.stones == self.sign * {"X": BLACK, "O": WHITE}[colour]).sum())

    def in_atari(self, *points: Point) -> list[bool]:
        flags = self.boards.atari.view(self.size, self.size)
        return [bool(flags[self.at(point)]) for point in points]


symmetries = st.fixed_dictionaries({"symmetry": st.integers(0, 7), "swapped": st.booleans()})
few = settings(max_examples=8, deadline=None)  # of 16 symmetries; sizes and places come on top


@st.composite
def anywhere(draw: st.DrawFn, height: int, width: int, largest: int = 7) -> dict[str, object]:
    """Arguments of Game that put a drawing of that height and width anywhere on a board that holds it."""
    size = draw(st.integers(max(height, width), max(height, width, largest)))
    corner = draw(st.integers(0, size - height)), draw(st.integers(0, size - width))
    return {"size": size, "corner": corner, **draw(symmetries)}


# ------------------------------------------------------------------------------------------------------ known shapes


@few
@given(st.integers(5, 9), symmetries)
def test_a_ladder_ends_at_the_edge(size: int, symmetry: dict[str, int]) -> None:
    game = Game(".X. XO. X..", size, **symmetry)
    for k in range(1, size - 2):
        for chase, flight in (((k, k + 1), (k + 1, k)), ((k + 2, k), (k + 1, k + 1))):
            game.play(chase)
            assert game.in_atari((1, 1)) == [True]
            game.play(flight)
            assert game.in_atari((1, 1)) == [False]
    game.play((size - 2, size - 1), (size - 1, size - 2))
    assert game.in_atari((1, 1)) == [True] and game.stones("O") == 2 * (size - 2)
    game.play((size - 1, size - 1))
    assert game.stones("O") == 0


@few
@given(st.integers(5, 9), symmetries)
def test_a_snapback_takes_back_more_than_was_taken(size: int, symmetry: dict[str, int]) -> None:
    game = Game("XO..X XOOOX .XXX.", size, **symmetry)
    game.play((0, 2))
    assert game.in_atari((0, 1), (0, 2)) == [True, True]
    game.play((0, 3))
    assert game.stones("O") == 5
    game.play((0, 2))
    assert game.stones("O") == 0


@few
@given(st.data(), st.integers(2, 7), st.booleans())
def test_one_stone_can_take_all_others(data: st.DataObject, size: int, suicide: bool) -> None:
    last = data.draw(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)))
    rows = [["O"] * size for _ in range(size)]
    rows[last[0]][last[1]] = "."
    game = Game(" ".join("".join(row) for row in rows), size, suicide)
    game.play(last)
    assert (game.stones("X"), game.stones("O")) == (1, 0)


@few
@given(symmetries)
def test_in_a_seki_neither_side_wants_to_move_and_the_point_between_counts_for_nobody(symmetry: dict[str, int]) -> None:
    seki = "OOOOO XXOOO .X.O. XXXOO XXXXX"
    game = Game(seki, 5, **symmetry)
    assert game.go.score(game.boards).item() == 12 - 12 - 0.5
    assert game.go.owner(game.boards).view(5, 5)[game.at((2, 2))] == 0
    assert not game.allows((2, 4)) and game.allows((2, 0))  # their eye, our eye
    game.play((2, 2))
    assert game.in_atari((2, 1), (2, 3)) == [True, True]  # the white chain has its eye left, the black chain too
    game.play((2, 0))
    assert game.stones("X") == 0


@few
@given(st.integers(5, 7), symmetries)
def test_territory_counts_for_the_only_colour_that_borders_on_it(size: int, symmetry: dict[str, int]) -> None:
    game = Game(".X.O. XX.OO .....", size, **symmetry)
    owner = game.go.owner(game.boards).view(size, size)
    black, dame, white = (owner[game.at(point)].item() * game.sign for point in ((0, 0), (0, 2), (0, 4)))
    assert (black, dame) == (1, 0)
    assert white == (-1 if size == 5 else 0)  # on a larger board the corner is open


# ---------------------------------------------------------------------------------------------------- ko and superko

KO = ".XO. XO.O .XO."


@few
@given(anywhere(3, 4))
def test_a_ko_is_retaken_only_after_an_exchange_elsewhere(place: dict[str, object]) -> None:
    game = Game(KO, **place)
    game.play((1, 2))
    assert not game.allows((1, 1)) and game.allows((1, 1), seen=[])
    game.play(None, (0, 0), (1, 1))


@few
@given(st.integers(9, 10), symmetries)
def test_a_triple_ko_may_not_go_round(size: int, symmetry: dict[str, int]) -> None:
    held_by_black = ".XO. X.XO .XO."
    game = Game(" ".join([KO, held_by_black, KO]), size, **symmetry)
    game.play((1, 2), (4, 1), (7, 2), (1, 1), (4, 2))
    assert not game.allows((7, 1))
    assert game.allows((7, 1), seen=game.seen[-2:]), "it is not the ko that was taken last"
    assert game.allows((7, 1), seen=game.seen[1:]), "only the first position forbids it"


@few
@given(st.integers(4, 7), symmetries)
def test_two_stones_sent_and_one_taken_back_is_a_repetition(size: int, symmetry: dict[str, int]) -> None:
    game = Game(".X.O XOO.", size, **symmetry)
    game.play((0, 2), (0, 0))
    assert game.stones("O") == 4
    assert not game.allows((0, 1))
    assert game.allows((0, 1), seen=game.seen[1:])


# ---------------------------------------------------------------------------------------------------------- suicide


@few
@given(st.integers(3, 7), symmetries, st.booleans())
def test_suicide_of_two_stones_is_as_the_rules_say_and_of_one_never(
    size: int, symmetry: dict[str, int], suicide: bool
) -> None:
    game = Game("X.O OO.", size, suicide, **symmetry)
    assert game.allows((0, 1)) == suicide
    single = Game(".O. O..", size, suicide, **symmetry)
    assert not single.allows((0, 0))
    if suicide:
        without = Game("..O OO.", size, suicide, **symmetry).boards.hash
        assert not game.allows((0, 1), seen=[without])
        game.play((0, 1))
        assert game.stones("X") == 0 and torch.equal(game.boards.hash, without)


# ------------------------------------------------------------------------------------------------------------ games


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.booleans(), st.lists(st.integers(0, 25), max_size=40))
def test_any_game_goes_as_the_plain_one(size: int, suicide: bool, choices: list[int]) -> None:
    game = Game("", size, suicide)
    for choice in choices:
        legal = [move for move in range(size**2) if game.allows(divmod(move, size))]
        move = [None, *legal][choice % (1 + len(legal))]
        if move is None and game.boards.passes[0]:  # a second pass would end it
            continue
        game.play(None if move is None else divmod(move, size))


def random_games(go: Go, n: int, moves: int, seed: int) -> Iterable[tuple[Boards, Tensor, Tensor]]:
    """Boards, their earlier positions and a legal move for each, move by move; a few pass and some games end."""
    draw = torch.Generator().manual_seed(seed)
    boards, seen = go.start(n), torch.full((n, moves), go.NO_POSITION)
    for number in range(moves):
        seen[:, number] = boards.hash
        weight = go.legal(boards, seen).float()
        weight[:, -1] *= 0.1
        move = torch.multinomial(weight, 1, generator=draw)[:, 0]
        yield boards, seen.clone(), move
        boards = go.play(boards, move)


@pytest.mark.parametrize("suicide", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_games_full_of_repetitions_go_as_plain_ones(size: int, suicide: bool) -> None:
    """On so small a board a game goes on until superko ends it."""
    go, n = ENGINES[size, suicide], 12
    plains, refused = [Plain(size, suicide) for _ in range(n)], 0
    for boards, seen, move in random_games(go, n, 100, seed=size):
        legal = go.legal(boards, seen)
        refused += int((go.legal(boards) & ~legal).sum())
        for k, plain in enumerate(plains):
            if go.ended(boards)[k]:
                continue
            points = [divmod(p, size) for p in range(size**2)]
            assert [plain.stones.get(p, 0) for p in points] == boards.stones[k].tolist()
            assert [plain.is_legal(p) for p in points] == legal[k, :-1].tolist()
            plain.play(divmod(int(move[k]), size) if move[k] < go.points else None)
    assert refused > 10


SIZES = pytest.mark.parametrize(("size", "suicide"), [(2, True), (5, False), (5, True), (9, False), (16, True)])


@SIZES
def test_what_is_carried_along_is_what_the_stones_say(size: int, suicide: bool) -> None:
    go = ENGINES[size, suicide]
    for boards, _, _ in random_games(go, 16, min(3 * size**2, 120), seed=1):
        fresh = go.from_stones(boards.stones, boards.to_play)
        assert torch.equal(fresh.atari, boards.atari)
        assert torch.equal(fresh.hash, boards.hash)
        assert torch.equal(boards.hash & COUNT, (boards.stones != 0).sum(1))
        label = boards.chain.long().clamp(max=go.points - 1)  # a chain's label is a stone of it, in both
        assert torch.equal(fresh.chain, torch.where(boards.stones == 0, boards.chain, fresh.chain.gather(1, label)))


@SIZES
def test_looking_everywhere_gives_the_same_as_looking_where_it_is_needed(size: int, suicide: bool) -> None:
    here, everywhere = ENGINES[size, suicide], Go(Rules(size, 0.5, suicide))
    everywhere.selects = False  # as on a GPU
    for boards, seen, move in random_games(here, 16, min(3 * size**2, 120), seed=2):
        for nothing in ((), (seen[:, :0],), (torch.full_like(seen, here.NO_POSITION),)):
            assert torch.equal(here.legal(boards, *nothing), everywhere.legal(boards, *nothing))
        legal = everywhere.legal(boards, seen[:, ::2], seen[:, 1::2])
        assert torch.equal(here.legal(boards, seen), legal)
        for left, right in zip(here.play(boards, move), everywhere.play(boards, move), strict=True):
            assert left.dtype == right.dtype and torch.equal(left, right)
    assert torch.equal(here.owner(boards), everywhere.owner(boards))


@pytest.mark.parametrize("suicide", [False, True])
def test_on_a_device_no_move_makes_the_host_wait(suicide: bool) -> None:
    """Tensors of the device `meta` have a shape and no content: whatever has to know the content is an error."""
    go = Go(Rules(9, 7.5, suicide), "meta")
    boards = Boards(*(field.to("meta") for field in ENGINES[9, suicide].start(3)))
    seen = torch.empty(3, 5, dtype=torch.int64, device="meta")
    assert go.legal(go.play(boards, torch.empty(3, dtype=torch.int64, device="meta")), seen).shape == (3, 82)
    assert go.score(boards).shape == (3,)


TURNS: list[Callable[[Tensor], Tensor]] = [
    lambda plane, quarter=quarter, mirror=mirror: (plane.mT if mirror else plane).rot90(quarter, (-2, -1))
    for quarter in range(4)
    for mirror in (False, True)
]


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(("size", "suicide"), [(5, True), (9, False)])
def test_a_turned_board_plays_alike(size: int, suicide: bool, turn: Callable[[Tensor], Tensor]) -> None:
    go = ENGINES[size, suicide]

    def turned(planes: Tensor) -> Tensor:
        return turn(planes.view(-1, size, size)).reshape(-1, go.points)

    where = torch.cat([turned(torch.arange(go.points)).argsort()[0], torch.tensor([go.points])])
    mirror, past = go.start(16), []
    for boards, seen, move in random_games(go, 16, 80, seed=3):
        past.append(mirror.hash)
        assert torch.equal(mirror.stones, turned(boards.stones))
        assert torch.equal(mirror.atari, turned(boards.atari))
        assert torch.equal(go.owner(mirror), turned(go.owner(boards)))
        legal, ours = go.legal(boards, seen), go.legal(mirror, torch.stack(past, 1))
        assert torch.equal(ours[:, :-1], turned(legal[:, :-1])) and torch.equal(ours[:, -1], legal[:, -1])
        mirror = go.play(mirror, where[move])


@SIZES
def test_boards_do_not_know_of_each_other(size: int, suicide: bool) -> None:
    go = ENGINES[size, suicide]
    games = list(random_games(go, 8, 60, seed=4))
    mixed = torch.arange(8) * 7 % len(games)  # boards from all over their games, some ended, in one batch
    boards = Boards(*(torch.stack([f[i] for i, f in enumerate(fields)]) for fields in zip(
        *(games[t][0] for t in mixed), strict=True)))  # fmt: skip
    seen, move = (torch.stack([games[t][part][i] for i, t in enumerate(mixed)]) for part in (1, 2))
    wide = Boards(*(torch.stack([field, field], -1)[..., 0] for field in boards))  # not contiguous
    together = [
        *go.play(boards, move),
        go.legal(boards, seen),
        go.legal(wide, seen),
        go.owner(wide),
        *go.play(wide, move),
    ]
    for i in range(8):
        one = Boards(*(field[i : i + 1] for field in boards))
        legal = go.legal(one, seen[i : i + 1])
        alone = [*go.play(one, move[i : i + 1]), legal, legal, go.owner(one), *go.play(one, move[i : i + 1])]
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


def test_an_ended_game_stays_as_it_is() -> None:
    go = ENGINES[5, False]
    boards = go.play(go.start(1), torch.tensor([7]))
    ended = go.play(go.play(boards, torch.tensor([25])), torch.tensor([25]))
    assert not go.ended(boards) and go.ended(ended)
    assert torch.equal(go.legal(ended)[0].nonzero()[:, 0], torch.tensor([25]))
    for move in (3, 25):
        for before, after in zip(ended, go.play(ended, torch.tensor([move])), strict=True):
            assert torch.equal(before, after)


def test_a_position_whose_game_is_not_known_may_repeat_anything() -> None:
    """`from_stones` cannot know what was captured earlier: any move may bring a position back."""
    go = ENGINES[5, False]
    seen = go.play(go.start(1), torch.tensor([7])).hash[:, None]
    assert not go.legal(go.from_stones(torch.zeros(1, 25), torch.tensor([BLACK])), seen)[0, 7]


@pytest.mark.parametrize("size", [1, 20])
def test_a_board_of_no_supported_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="2 to 19"):
        Go(Rules(size, 0.5))
