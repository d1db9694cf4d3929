"""Records of games: read back by sgfmill as they were played; boards in letters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sgfmill import sgf, sgf_moves

from timetrial_minigo.go import BLACK, WHITE, Go, Rules
from timetrial_minigo.opponent import Game
from timetrial_minigo.sgf import board_lines, final_board, result, save_games, to_sgf

RULES = Rules(5, 0.5)
# White takes the stone in the corner.
GAME = Game(number=7, colour=WHITE, moves=(0, 1, 24, 5, 25, 25), opening=2, score=-2.5, ending="score")


def test_a_record_is_read_back_as_it_was_played() -> None:
    record = sgf.Sgf_game.from_bytes(to_sgf(GAME, RULES, "ours", "theirs"))
    assert (record.get_size(), record.get_komi(), record.get_winner()) == (5, 0.5, "w")
    assert (record.get_player_name("b"), record.get_player_name("w")) == ("theirs", "ours")
    assert record.get_root().get("RE") == "W+2.5"
    _, plays = sgf_moves.get_setup_and_moves(record)
    moves = [25 if point is None else point[0] * 5 + point[1] for _, point in plays]
    assert [colour for colour, _ in plays] == ["b", "w"] * 3
    assert tuple(moves) == GAME.moves


def test_sgfmill_and_our_engine_come_to_the_same_position() -> None:
    board, plays = sgf_moves.get_setup_and_moves(sgf.Sgf_game.from_bytes(to_sgf(GAME, RULES, "a", "b")))
    go = Go(RULES)
    boards = go.start(1)
    for (colour, point), move in zip(plays, GAME.moves, strict=True):
        boards = go.play(boards, torch.tensor([move]))
        if point is not None:
            board.play(*point, colour)
    signs = {"b": BLACK, "w": WHITE, None: 0}
    theirs = [signs[board.get(row, column)] for row in range(5) for column in range(5)]
    assert boards.stones[0].tolist() == theirs
    assert board.area_score() - RULES.komi == go.score(boards).item()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "W+2.5"),
        ({"score": 12.0}, "B+12"),
        ({"score": 0.0}, "0"),
        ({"ending": "move limit"}, "W+2.5"),
        ({"ending": "resignation"}, "W+R"),
        ({"ending": "illegal move", "colour": BLACK}, "B+F"),
    ],
)
def test_the_result_is_in_the_words_of_sgf(changes: dict[str, object], text: str) -> None:
    assert result(replace(GAME, **changes)) == text


def test_games_are_saved_under_their_numbers(tmp_path: Path) -> None:
    save_games(tmp_path / "games", [GAME, replace(GAME, number=12)], RULES, "ours", "theirs")
    assert sorted(path.name for path in (tmp_path / "games").iterdir()) == ["game_0007.sgf", "game_0012.sgf"]


def test_a_board_in_letters_has_its_first_row_at_the_bottom_and_leaves_out_the_letter_i() -> None:
    stones = [0] * 81
    stones[0], stones[8], stones[80] = BLACK, WHITE, BLACK
    lines = board_lines(stones, 9, last=8)
    assert lines[0] == lines[-1] == "   A B C D E F G H J"
    assert lines[1] == " 9 . . . . . . . . X 9"
    assert lines[9] == " 1 X . . . . . . .(O)1"


def test_a_report_shows_where_a_game_ended() -> None:
    assert final_board(GAME, RULES) == [
        "game 7: ours is white, 6 moves, W+2.5 (score)",
        "   A B C D E",
        " 5 . . . . X 5",
        " 4 . . . . . 4",
        " 3 . . . . . 3",
        " 2 O . . . . 2",
        " 1 . O . . . 1",
        "   A B C D E",
    ]
