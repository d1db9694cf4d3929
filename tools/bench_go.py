"""How fast the rules of Go are: moves a second of random games, for our batched engine and for open_spiel's.

    uv run python tools/bench_go.py
    uv run python tools/bench_go.py --sizes 19 --batches 1024 --rounds 9
    uv run python tools/bench_go.py --device cuda --batches 1024 8192

Both play whole games from the empty board, up to 2 * P moves (P points, open_spiel's limit), each move drawn evenly
from all legal ones. Ours checks all moves against all earlier positions of the game (positional superko); open_spiel,
which is called game by game from Python, forbids kos and ends a game that repeats. One torch thread, one process.
Rounds are interleaved; figures are medians (minimum to maximum) over the rounds, of moves per second of CPU time (on
CUDA of wall time), drawing the moves included. The other columns say where ours spends its time, in a separate pass:
microseconds for a board and move, over all moves of the games.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyspiel
import torch
from torch import Tensor

from core.api.statistics import race, ratios, row, spread, table
from timetrial_minigo.go import Boards, Go, Rules

OPEN_SPIEL = "open_spiel"
PARTS = ("legal", "choice", "play")


class Ours:
    """Random games, `batch` of them side by side."""

    def __init__(self, size: int, batch: int, device: str) -> None:
        self.go, self.batch = Go(Rules(size, 7.5), device), batch
        self.draw = torch.Generator(device).manual_seed(0)
        self.limit = 2 * self.go.points
        self.seen = torch.empty(batch, self.limit, dtype=torch.int64, device=device)

    def choose(self, legal: Tensor) -> Tensor:
        """One of the legal moves of each board, all as likely."""
        number = legal.cumsum(1, dtype=torch.int16)
        wanted = torch.rand(len(legal), 1, generator=self.draw, device=legal.device) * number[:, -1:]
        return (number <= wanted.to(torch.int16)).sum(1)

    def games(self, lap: Callable[[str], None] = lambda part: None) -> int:
        """Plays all games to their end; the number of moves. `lap` is called after each part of a move."""
        boards, moves = self.go.start(self.batch), torch.zeros((), dtype=torch.int64, device=self.go.device)
        for number in range(self.limit):
            self.seen[:, number] = boards.hash
            moves += (~self.go.ended(boards)).sum()
            lap("rest")
            legal = self.go.legal(boards, self.seen[:, : number + 1])
            lap("legal")
            move = self.choose(legal)
            lap("choice")
            boards: Boards = self.go.play(boards, move)
            lap("play")
        return int(moves)


class OpenSpiel:
    """Random games, one after the other."""

    def __init__(self, size: int) -> None:
        self.game, self.draw = pyspiel.load_game(f"go(board_size={size},komi=7.5)"), random.Random(0)

    def games(self) -> int:
        state, moves = self.game.new_initial_state(), 0
        while not state.is_terminal():
            state.apply_action(self.draw.choice(state.legal_actions()))
            moves += 1
        return moves


def clock(device: str) -> float:
    """Seconds: of this process's CPU time, or of wall time once the GPU has nothing left to do."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def rate(player: Ours | OpenSpiel, seconds: float, device: str) -> float:
    """Moves a second, over whole games, for at least this number of seconds."""
    start, moves = clock(device), 0
    while (spent := clock(device) - start) < seconds:
        moves += player.games()
    return moves / spent


def parts(player: Ours, device: str) -> dict[str, float]:
    """Microseconds for a board and move of each part."""
    spent = dict.fromkeys((*PARTS, "rest"), 0.0)
    last = clock(device)

    def lap(part: str) -> None:
        nonlocal last
        now = clock(device)
        spent[part], last = spent[part] + now - last, now

    moves = player.games(lap)
    return {part: 1e6 * spent[part] / moves for part in PARTS}


def compare(size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of each contender, round by round, and the parts of ours."""
    players: dict[str, Any] = {f"{n} boards": Ours(size, n, arguments.device) for n in arguments.batches}
    players[OPEN_SPIEL] = OpenSpiel(size)
    for player in players.values():  # warm-up
        player.games()
    contenders = {name: partial(rate, player, arguments.seconds, arguments.device) for name, player in players.items()}
    return {
        name: {"rates": rates, "parts": parts(players[name], arguments.device) if name != OPEN_SPIEL else {}}
        for name, rates in race(contenders, arguments.rounds).items()
    }


def rows(size: int, figures: dict[str, Any]) -> list[str]:
    lines = []
    for name, of in figures.items():
        gains = spread(ratios(of["rates"], figures[OPEN_SPIEL]["rates"]))
        shares = [f"{of['parts'][part]:.2f}" if of["parts"] else "" for part in PARTS]
        lines.append(row([f"{size}x{size}", name, f"{spread(of['rates']):,.0f}", f"{gains:.2f}", *shares]))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=(9, 19))
    parser.add_argument("--batches", type=int, nargs="+", default=(16, 128, 1024))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="that a contender plays for in a round, at least")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(table(["board", "engine", "moves/s", "times open_spiel", *(f"{part} us" for part in PARTS)]))
    figures: dict[str, Any] = {}
    for size in arguments.sizes:
        figures[str(size)] = compare(size, arguments)
        print("\n".join(rows(size, figures[str(size)])), flush=True)
    versions = {name: metadata.version(name) for name in ("torch", "open_spiel")}
    versions |= {"python": platform.python_version()}
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    print(f"\nn={arguments.rounds}, {device}, one thread; {versions}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"versions": versions, "command": sys.argv, "rounds": figures}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
