"""Matches: the same games whoever plays them beside which, fair in colours and openings, refereed by our rules."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

import pyspiel
import pytest
import torch
from torch import Tensor

from core.api.errors import TimetrialError, UsageError
from timetrial_minigo.go import BLACK, WHITE, Boards, Go, Rules
from timetrial_minigo.opponent import RESIGN, Choose, Game, OpenSpiel, Player, Program, gnu_go, play_match

RULES = Rules(5, 0.5)
PASS = 25
needs_gnu_go = pytest.mark.skipif(
    not (shutil.which("gnugo") or shutil.which("gnugo", path="/usr/games")), reason="GNU Go is not installed"
)


def any_move(go: Go) -> Choose:
    """Our side: a point that is drawn from the position's hash; the pass where there is no other move."""

    def choose(boards: Boards, history: Tensor, seen: Tensor) -> Tensor:
        draws = [torch.rand(go.moves, generator=torch.Generator().manual_seed(h % 2**31)) for h in boards.hash.tolist()]
        worth = go.legal(boards, seen) * (torch.stack(draws) + 1)
        worth[:, -1] = 0.5
        return worth.argmax(1)

    return choose


def match(opponent: object, games: Sequence[int], seed: int = 1, opening: int = 3, move_limit: int = 60) -> list[Game]:
    go = Go(RULES)
    return play_match(go, any_move(go), opponent, games, seed, history=2, opening=opening, move_limit=move_limit)


def replay(game: Game) -> float:
    """Plays a record again, each move legal by our rules, and returns its score."""
    go = Go(RULES)
    boards, hashes = go.start(1), []
    for move in game.moves:
        hashes.append(boards.hash)
        assert go.legal(boards, torch.stack(hashes, 1))[0, move]
        boards = go.play(boards, torch.tensor([move]))
    assert bool(go.ended(boards)) == (game.ending == "score")
    return go.score(boards).item()


class Scripted:
    """An opponent that plays its list of moves, then passes; what it was told is written down."""

    name = "scripted"

    def __init__(self, *moves: int) -> None:
        self.moves, self.told, self.closed = moves, [], 0

    def player(self, rules: Rules, move_limit: int, seed: int) -> Player:
        return _ScriptedPlayer(self)


class _ScriptedPlayer:
    def __init__(self, script: Scripted) -> None:
        self.script, self.coming = script, iter(script.moves)

    def receive(self, move: int) -> None:
        self.script.told.append(move)

    def generate(self, legal: Sequence[bool]) -> int:
        return next(self.coming, PASS)

    def close(self) -> None:
        self.script.closed += 1


@pytest.mark.parametrize(
    "opponent", [OpenSpiel(20), pytest.param("gnugo", marks=needs_gnu_go)], ids=["open_spiel", "gnugo"]
)
def test_a_game_is_the_same_whatever_games_are_played_beside_it(opponent: object) -> None:
    opponent = gnu_go(1, RULES) if opponent == "gnugo" else opponent
    together = match(opponent, range(6))
    assert match(opponent, [5, 2]) == [together[5], together[2]]
    assert match(opponent, [5, 2], seed=2) != [together[5], together[2]]


def test_games_come_in_pairs_with_the_same_opening_and_colours_swapped() -> None:
    games = match(OpenSpiel(5), range(20))
    openings = [game.moves[: game.opening] for game in games]
    assert [game.colour for game in games] == [BLACK, WHITE] * 10
    assert openings[0::2] == openings[1::2]
    assert {len(opening) for opening in openings} == {1, 2, 3}
    assert all(PASS not in opening for opening in openings)
    assert len(set(openings)) > 5


def test_without_openings_black_begins_on_the_empty_board() -> None:
    assert [game.opening for game in match(OpenSpiel(5), range(2), opening=0)] == [0, 0]


def test_every_game_is_legal_by_our_rules_to_the_score_that_it_reports() -> None:
    for game in match(OpenSpiel(10), range(30)):
        assert replay(game) == game.score
        assert game.won == (game.score * game.colour > 0)


def test_a_game_that_reaches_the_move_limit_is_scored_as_it_stands() -> None:
    for game in match(OpenSpiel(5), range(4), move_limit=10):
        assert (game.ending, len(game.moves)) == ("move limit", 10)
        assert replay(game) == game.score


def test_the_bot_plays_another_move_where_open_spiel_would_end_a_repetition_as_a_draw() -> None:
    """Black's first stone stood alone on B1. White has taken it and filled the board but for B1, where black's capture
    of everything would bring that position back."""
    limit = 100
    white = [0, 6, 2, *(p for p in range(25) if p not in (0, 1, 2, 6))]
    moves = [1, *(m for point in white for m in (point, PASS))]
    go, hashes = Go(RULES), []
    boards, player = go.start(1), OpenSpiel(50).player(RULES, limit, seed=1)
    state = pyspiel.load_game(f"go(board_size=5,komi=0.5,max_game_length={limit})").new_initial_state()
    for move in moves[:-1]:
        hashes.append(boards.hash)
        boards = go.play(boards, torch.tensor([move]))
        player.receive(move)
        state.apply_action(move)
    legal = go.legal(boards, torch.stack(hashes, 1))[0].tolist()
    assert state.legal_actions() == [1, PASS]
    assert [move for move, allowed in enumerate(legal) if allowed] == [PASS]
    assert player.generate(legal) == PASS
    state.apply_action(1)
    assert state.is_terminal()
    assert state.returns() == [0.0, 0.0]


def test_open_spiel_is_refused_with_fewer_simulations_than_it_needs() -> None:
    with pytest.raises(UsageError, match="2 simulations or more"):
        OpenSpiel(1)


def test_the_weakest_bot_plays_whole_games() -> None:
    assert all(replay(game) == game.score for game in match(OpenSpiel(2), range(40)))


def test_open_spiel_is_refused_where_suicide_is_allowed() -> None:
    with pytest.raises(UsageError, match="suicide"):
        OpenSpiel(5).player(Rules(5, 0.5, suicide=True), 60, 1)


def test_an_opponent_that_resigns_or_plays_an_illegal_move_loses() -> None:
    resigned = match(Scripted(12, RESIGN), [1], opening=0)[0]
    illegal = match(Scripted(12, 12), [1], opening=0)[0]
    assert (resigned.ending, resigned.won, len(resigned.moves)) == ("resignation", 1.0, 2)
    assert (illegal.ending, illegal.won, len(illegal.moves)) == ("illegal move", 1.0, 2)


def test_an_opponent_is_told_the_opening_and_our_moves_and_is_closed() -> None:
    script = Scripted()
    game = match(script, [0])[0]
    theirs = [i for i in range(game.opening, len(game.moves)) if (i % 2 == 0) != (game.colour == BLACK)]
    assert script.told == [move for i, move in enumerate(game.moves) if i not in theirs]
    assert script.closed == 1


def test_a_komi_without_a_fraction_can_end_in_a_draw() -> None:
    drawn = Game(number=0, colour=WHITE, moves=(), opening=0, score=0.0, ending="score")
    assert drawn.won == 0.5


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("no-such-go-program", "cannot start 'no-such-go-program'"),
        (f"{sys.executable} -c pass", "ended without an answer to 'boardsize 5'"),
        (f"{sys.executable} -c \"print('? no\\n', flush=True); input()\"", "refuses 'boardsize 5': no"),
    ],
)
def test_a_program_that_is_absent_dies_or_refuses_is_an_error_of_one_line(program: str, problem: str) -> None:
    import shlex

    with pytest.raises(TimetrialError, match=problem) as failed:
        match(Program(shlex.split(program)), range(2))
    assert "\n" not in str(failed.value)


def test_a_program_that_answers_with_nonsense_is_named() -> None:
    code = "for line in iter(input, 'quit'): print('= here' if 'genmove' in line else '=', end='\\n\\n', flush=True)"
    with pytest.raises(TimetrialError, match="answers genmove with an invalid vertex 'here'"):
        match(Program([sys.executable, "-c", code]), range(2))


@needs_gnu_go
def test_gnu_go_plays_by_our_rules() -> None:
    """It refuses an illegal move of ours, so each of its games is legal by both sides' rules."""
    games = match(gnu_go(1, RULES), range(6))
    assert {game.ending for game in games} == {"score"}
    assert [replay(game) for game in games] == [game.score for game in games]
