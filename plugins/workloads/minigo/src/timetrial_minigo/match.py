"""A match of a trained network against a program that is not ours:

    python -m timetrial_minigo.match RUN_FOLDER [games=20] [opponent=gnugo] [level=1] [simulations=N] ...

plays the network in the newest checkpoint of a run folder. `opponent` is `gnugo` (`level` 1 to 10), `open_spiel` (its
MCTS bot; `level` simulations for each move) or the command of any program that speaks GTP 2. Every move is legal by the
rules of both sides: ours are checked by the program, which is an error if it refuses one, and its moves by our engine,
where an illegal one loses. It prints a table, and leaves an SGF record of each game.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.api.config import checked, validate
from core.api.errors import UsageError, exit_status
from core.api.tables import print_table
from timetrial_minigo.go import BLACK, WHITE, Go, Rules
from timetrial_minigo.opponent import Game, OpenSpiel, Opponent, Program, gnu_go, play_match
from timetrial_minigo.sgf import final_board, save_games
from timetrial_minigo.trained import load, split_arguments


@dataclass(kw_only=True)
class Settings:
    """Of the command line."""

    games: int = checked(at_least=1)
    opponent: str
    level: int = checked(at_least=1)
    simulations: int | None = checked(at_least=0)
    """Ours, for each move; as many as in self-play where none is given; 0: the network's first choice."""
    opening: int = checked(at_least=0)
    """Most random stones before a game; two games with colours swapped begin with the same ones."""
    move_limit: int | None = checked(at_least=1)
    """Four for each point of the board where none is given: to capture all dead stones takes moves."""
    seed: int = checked(at_least=0)
    sgf: str | None
    """Folder for the records; one in the run folder where none is given."""


DEFAULTS = {
    "games": 20, "opponent": "gnugo", "level": 1, "simulations": None, "opening": 3, "move_limit": None, "seed": 1,
    "sgf": None,
}  # fmt: skip
MOVES_PER_POINT = 4
USAGE = f"python -m timetrial_minigo.match RUN_FOLDER [KEY=VALUE ...] with {', '.join(DEFAULTS)}"


def opponent_by_name(name: str, level: int, rules: Rules) -> Opponent:
    """UsageError where there is no such opponent on this machine."""
    if name == "gnugo":
        return gnu_go(level, rules)
    if name == "open_spiel":
        return OpenSpiel(level)
    try:
        command = shlex.split(name)
    except ValueError as error:
        raise UsageError(f"opponent={name}: {error}") from None
    if not command:
        raise UsageError("opponent= is empty: give gnugo, open_spiel or the command of a program that speaks GTP")
    return Program(command)


def standard_error(win_rate: float, games: int) -> float:
    """Of a share of independent games. Games in pairs with one opening are no worse: what favours one side in the first
    favours the other in the second."""
    return math.sqrt(win_rate * (1 - win_rate) / games)


def print_results(games: Sequence[Game]) -> None:
    """The table: by our colour, and together."""
    rows = list[tuple[str, ...]]()
    for words, colours in (("black", {BLACK}), ("white", {WHITE}), ("both", {BLACK, WHITE})):
        played = [game for game in games if game.colour in colours]
        if played:
            won = sum(game.won for game in played)
            rate, moves = won / len(played), sum(len(game.moves) for game in played) / len(played)
            error = standard_error(rate, len(played))
            rows.append((words, str(len(played)), f"{won:g}", f"{rate:.3f}", f"{error:.3f}", f"{moves:.1f}"))
    print_table(("ours is", "games", "won", "win rate", "standard error", "moves per game"), rows, 100)
    endings = Counter(game.ending for game in games)
    print("ended by " + ", ".join(f"{ending}: {count}" for ending, count in endings.most_common()))


def main() -> int:
    """The command. Returns the exit status."""
    return exit_status(_main)


def _main() -> int:
    folder, given = split_arguments(sys.argv[1:], USAGE)
    settings = validate(Settings, {**DEFAULTS, **given}, "")
    trained = load(folder)
    go = Go(trained.rules)
    opponent = opponent_by_name(settings.opponent, settings.level, go.rules)
    simulations = trained.config.simulations if settings.simulations is None else settings.simulations
    games = play_match(
        go, trained.chooser(simulations, settings.games)(go), opponent, range(settings.games), settings.seed,
        history=trained.history, opening=settings.opening,
        move_limit=settings.move_limit or MOVES_PER_POINT * go.points,
    )  # fmt: skip
    ours = f"{trained.name}, {f'{simulations} simulations' if simulations else 'first choice'}"
    records = Path(settings.sgf or folder / "matches" / re.sub(r"\W+", "-", opponent.name).strip("-"))
    save_games(records, games, go.rules, ours, opponent.name)
    print(f"{ours}, against {opponent.name}, on {go.size}x{go.size}, komi {go.rules.komi:g}")
    print_results(games)
    print("\n".join(final_board(games[-1], go.rules)))
    print(f"records: {records}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
