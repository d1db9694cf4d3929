"""Games as a person reads them: SGF records, and a board in letters.

SGF is File Format 4 (Hollosi, 1999), written with sgfmill, so that any Go program or viewer opens it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sgfmill.sgf import Sgf_game

from timetrial_minigo.go import BLACK, Go, Rules
from timetrial_minigo.notation import COLOURS, COLUMNS
from timetrial_minigo.opponent import Game

SIGNS = {0: ".", 1: "X", -1: "O"}
"""An empty point, a black stone and a white one, as GNU Go prints them."""


def to_sgf(game: Game, rules: Rules, ours: str, theirs: str) -> bytes:
    """The record of a game between two named players."""
    record = Sgf_game(rules.size)
    black, white = (ours, theirs) if game.colour == BLACK else (theirs, ours)
    root = record.get_root()
    suicide = "suicide of several stones allowed" if rules.suicide else "suicide forbidden"
    for key, value in {
        "PB": black, "PW": white, "KM": rules.komi, "RE": result(game), "GN": f"game {game.number}",
        "RU": f"area scoring by Tromp and Taylor, positional superko, {suicide}",
    }.items():  # fmt: skip
        root.set(key, value)
    drawn = f"The first {game.opening} moves were drawn at random. " if game.opening else ""
    root.set("C", f"{drawn}Ended by: {game.ending}.")
    for number, move in enumerate(game.moves):
        point = None if move == rules.size**2 else divmod(move, rules.size)
        record.extend_main_sequence().set_move("bw"[number % 2], point)
    return record.serialise()


def result(game: Game) -> str:
    """As SGF's RE: "B+2.5", "W+R" (resignation), "W+F" (illegal move) or "0" (a draw)."""
    if game.ending in _LOST_BY:
        return f"{'B' if game.colour == BLACK else 'W'}+{_LOST_BY[game.ending]}"
    return score_text(game.score)


def score_text(score: float) -> str:
    """A score, black minus white, as SGF and GTP have it: "B+2.5", "W+1" or, where nobody wins, "0"."""
    return f"{'B' if score > 0 else 'W'}+{abs(score):g}" if score else "0"


_LOST_BY = {"resignation": "R", "illegal move": "F"}


def save_games(folder: Path, games: Iterable[Game], rules: Rules, ours: str, theirs: str) -> None:
    """Writes game_<number>.sgf for each game; the folder is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for game in games:
        (folder / f"game_{game.number:04d}.sgf").write_bytes(to_sgf(game, rules, ours, theirs))


def board_lines(stones: Sequence[int], size: int, last: int | None = None) -> list[str]:
    """A board in letters, from the top row down; the point of the `last` move is in brackets."""
    letters = "   " + " ".join(COLUMNS[:size])
    lines = [letters]
    for row in reversed(range(size)):
        cells = "".join(f" {SIGNS[stone]}" for stone in stones[row * size : (row + 1) * size]) + " "
        if last is not None and last // size == row:  # a pass is on no row
            at = 2 * (last % size)
            cells = f"{cells[:at]}({cells[at + 1]}){cells[at + 3 :]}"
        lines.append(f"{row + 1:2}{cells}{row + 1}")
    return [*lines, letters]


def final_board(game: Game, rules: Rules) -> list[str]:
    """The position in which a game ended, in letters, under a line that says how it went: for a report."""
    go = Go(rules)
    boards = go.start(1)
    for move in game.moves:
        boards = go.play(boards, boards.hash.new_tensor([move]))
    head = (
        f"game {game.number}: ours is {COLOURS[game.colour]}, {len(game.moves)} moves, {result(game)} ({game.ending})"
    )
    last = game.moves[-1] if game.moves else None
    return [head, *board_lines(boards.stones[0].tolist(), rules.size, last)]
