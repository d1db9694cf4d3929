"""The protocol as its specification has it (GTP 2, draft 2), for a session whose player needs no network."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from timetrial_minigo.go import Boards, Go, Rules
from timetrial_minigo.gtp import Session, serve
from timetrial_minigo.notation import parse_vertex, vertex
from timetrial_minigo.opponent import Choose

Ask = Callable[[str], str]


def lowest_point(go: Go) -> Choose:
    def choose(boards: Boards, history: Tensor, seen: Tensor) -> Tensor:
        worth = go.legal(boards, seen).float()
        worth[:, -1] = 0.5
        return worth.argmax(1)

    return choose


@pytest.fixture
def session() -> Session:
    return Session(Go(Rules(5, 0.5)), lowest_point, history=2, name="lowest point")


@pytest.fixture
def ask(session: Session) -> Ask:
    """The answer to a command that carries an id; it must succeed."""

    def ask(line: str) -> str:
        answer = session.answer(f"1 {line}\n")
        assert answer is not None
        assert answer.startswith("=1 ")
        assert answer.endswith("\n\n")
        return answer[3:-2]

    return ask


def test_it_speaks_version_2_and_says_who_it_is(ask: Ask) -> None:
    assert ask("protocol_version") == "2"
    assert ask("name") == "lowest point"
    assert ask("version")


def test_it_knows_every_command_that_the_protocol_requires(ask: Ask) -> None:
    required = (
        "protocol_version name version known_command list_commands quit boardsize clear_board komi play genmove".split()
    )
    assert set(required) <= set(ask("list_commands").splitlines())
    assert all(ask(f"known_command {name}") == "true" for name in ask("list_commands").splitlines())
    assert ask("known_command make_tea") == "false"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("name\n", "= lowest point\n\n"),
        ("12 name\n", "=12 lowest point\n\n"),
        ("  name  # who are you\r\n", "= lowest point\n\n"),
        ("3\tname\x01\n", "=3 lowest point\n\n"),
        ("komi 6.5\n", "= \n\n"),
        ("make_tea\n", "? unknown command\n\n"),
        ("4 make_tea now\n", "?4 unknown command\n\n"),
        ("\n", None),
        ("# 5 name\n", None),
    ],
)
def test_a_line_is_read_and_answered_in_the_protocols_form(session: Session, line: str, answer: str | None) -> None:
    assert session.answer(line) == answer


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("boardsize", "syntax error"),
        ("boardsize five", "syntax error"),
        ("boardsize 9", "unacceptable size"),
        ("komi nan", "syntax error"),
        ("play black", "syntax error"),
        ("play green a1", "syntax error"),
        ("play black i1", "syntax error"),
        ("play black a6", "syntax error"),
        ("play black a0", "syntax error"),
        ("play white c3", "illegal move"),
        ("genmove", "syntax error"),
    ],
)
def test_a_command_that_fails_changes_nothing(session: Session, line: str, problem: str) -> None:
    session.answer("play black C3\n")
    before = session.answer("showboard\n")
    answer = session.answer(f"8 {line}\n")
    assert answer is not None
    assert answer.startswith(f"?8 {problem}")
    assert answer.endswith("\n\n")
    assert session.answer("showboard\n") == before


def test_moves_are_played_shown_and_taken_back(ask: Ask) -> None:
    ask("play B a1")
    ask("play white B1")
    ask("play b pass")
    ask("play w A2")  # takes A1
    assert ask("showboard").splitlines()[-2] == " 1 . O . . . 1"
    assert ask("final_score") == "W+25.5"
    ask("undo")
    assert ask("showboard").splitlines()[-2] == " 1 X O . . . 1"
    for _ in range(3):
        ask("undo")
    assert ask("final_score") == "W+0.5"


def test_nothing_can_be_taken_back_from_the_empty_board(session: Session) -> None:
    assert session.answer("undo\n") == "? cannot undo\n\n"


def test_a_generated_move_is_played_and_a_suggested_one_is_not(ask: Ask) -> None:
    assert ask("reg_genmove b") == "A1"
    assert ask("genmove b") == "A1"
    assert ask("genmove w") == "B1"


def test_a_repeated_position_is_illegal(session: Session, ask: Ask) -> None:
    for move in "b b1,w c1,b a2,w d2,b b3,w c3,b c2,w b2".split(","):  # white takes C2
        ask(f"play {move}")
    assert session.answer("play b c2\n") == "? illegal move\n\n"


def test_either_colour_may_play_twice_and_after_two_passes(ask: Ask) -> None:
    for move in ("b a1", "b b1", "w pass", "b pass", "w c1"):
        ask(f"play {move}")
    assert ask("genmove w") == "D1"


def test_clocks_are_accepted(ask: Ask) -> None:
    assert ask("time_settings 60 30 5") == ""
    assert ask("time_left b 25 0") == ""


def test_komi_counts_and_outlives_a_new_board(ask: Ask) -> None:
    ask("komi 3.5")
    ask("boardsize 5")
    ask("clear_board")
    assert ask("final_score") == "W+3.5"


def test_it_answers_until_it_is_told_to_quit(session: Session) -> None:
    answers = io.StringIO()
    serve(session, iter(["1 name\n", "2 quit\n", "3 name\n"]), answers)
    assert answers.getvalue() == "=1 lowest point\n\n=2 \n\n"


def test_the_end_of_the_input_ends_it(session: Session) -> None:
    answers = io.StringIO()
    serve(session, iter(["1 name\n"]), answers)
    assert answers.getvalue() == "=1 lowest point\n\n"


@pytest.mark.parametrize("size", [5, 9, 19])
def test_every_move_has_a_name_that_is_read_in_either_case(size: int) -> None:
    moves = range(size * size + 1)
    assert [parse_vertex(vertex(move, size), size) for move in moves] == list(moves)
    assert [parse_vertex(vertex(move, size).lower(), size) for move in moves] == list(moves)
    assert len({vertex(move, size) for move in moves}) == len(moves)


def test_points_are_named_from_the_lower_left_corner() -> None:
    assert [vertex(move, 19) for move in (0, 8, 19, 360, 361)] == ["A1", "J1", "A2", "T19", "pass"]


def test_our_side_is_given_the_recent_positions_and_zeros_before_them() -> None:
    given: list[Tensor] = []

    def chooser(go: Go) -> Choose:
        def choose(boards: Boards, history: Tensor, seen: Tensor) -> Tensor:
            given.append(history)
            assert torch.equal(history[:, 0], boards.stones)
            assert seen.shape == (1, 3)
            return torch.tensor([go.points])

        return choose

    session = Session(Go(Rules(5, 0.5)), chooser, history=4, name="passes")
    for line in ("play b a1", "play w b1", "genmove b"):
        session.answer(line)
    (history,) = given
    assert history.shape == (1, 4, 25)
    assert history.abs().sum(2).tolist() == [[2, 1, 0, 0]]
