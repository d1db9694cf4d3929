"""The Go Text Protocol, so that any Go program or board can play a trained network:

    python -m timetrial_minigo.gtp RUN_FOLDER [simulations=N]

speaks GTP 2 (Farnebäck, "Specification of the Go Text Protocol, version 2, draft 2", 2002) on stdin and stdout, for the
network in the newest checkpoint of that run folder. It searches as the run's own configuration has it, with N
simulations for each move (as many as in self-play, where N is not given); `simulations=0` plays the network's first
choice. It runs on the CPU.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, TextIO

import torch

from core.api.config import checked, validate
from core.api.errors import exit_status
from timetrial_minigo.go import BLACK, WHITE, Boards, Go
from timetrial_minigo.notation import parse_vertex, vertex
from timetrial_minigo.opponent import Choose
from timetrial_minigo.sgf import board_lines, score_text
from timetrial_minigo.trained import load, split_arguments


@dataclass(kw_only=True)
class Settings:
    """Of the command line."""

    simulations: int | None = checked(at_least=0)


class GtpError(Exception):
    """A command that cannot be carried out, in the protocol's words."""


class Session:
    """One game, on the board size that the network was made for, and the protocol's commands on it."""

    def __init__(self, go: Go, chooser: Callable[[Go], Choose], history: int, name: str) -> None:
        """`chooser(go)` makes our side, anew when the komi changes; `history` is its H."""
        self._go, self._chooser, self._history, self.over = go, chooser, history, False
        self._choose = chooser(go)
        self._commands: dict[str, tuple[Callable[..., str | None], *tuple[Callable[[str], Any], ...]]] = {
            "protocol_version": (lambda: "2",),
            "name": (lambda: name,),
            "version": (lambda: metadata.version("timetrial"),),
            "known_command": (lambda command: str(command in self._commands).lower(), str),
            "list_commands": (lambda: "\n".join(self._commands),),
            "quit": (self._quit,),
            "boardsize": (self._boardsize, int),
            "clear_board": (self._clear_board,),
            "komi": (self._komi, _finite),
            "play": (self._play, _colour, self._move),
            "genmove": (self._genmove, _colour),
            "reg_genmove": (self._reg_genmove, _colour),
            "undo": (self._undo,),
            "time_settings": (lambda *_: None, int, int, int),
            "time_left": (lambda *_: None, _colour, int, int),
            "final_score": (lambda: score_text(self._go.score(self._positions[-1]).item()),),
            "showboard": (self._showboard,),
        }  # the time of a move is set by `simulations`: clocks are accepted and change nothing
        self._clear_board()

    def answer(self, line: str) -> str | None:
        """The whole answer to one line, empty line included; None where the line holds no command."""
        number, name, *words = _parsed(line)
        if not name:
            return f"?{number} no command\n\n" if number else None
        if name not in self._commands:
            return f"?{number} unknown command\n\n"
        command, *parsers = self._commands[name]
        try:
            arguments = [parse(word) for parse, word in zip(parsers, words, strict=True)]
        except ValueError as error:  # also where there are more or fewer words than the command takes
            return f"?{number} syntax error: {error}\n\n"
        try:
            return f"={number} {command(*arguments) or ''}\n\n"
        except GtpError as error:
            return f"?{number} {error}\n\n"

    def _quit(self) -> None:
        self.over = True

    def _boardsize(self, size: int) -> None:
        if size != self._go.size:
            raise GtpError("unacceptable size")
        self._clear_board()

    def _clear_board(self) -> None:
        self._positions = [self._go.start(1)]
        self._moves: list[int] = []

    def _komi(self, komi: float) -> None:
        self._go = Go(replace(self._go.rules, komi=komi), self._go.device)
        self._choose = self._chooser(self._go)

    def _play(self, colour: int, move: int) -> None:
        boards = self._turn(colour)
        if not self._go.legal(boards, self._seen())[0, move]:
            raise GtpError("illegal move")
        self._positions.append(self._go.play(boards, torch.tensor([move], device=self._go.device)))
        self._moves.append(move)

    def _genmove(self, colour: int) -> str:
        name = self._reg_genmove(colour)
        self._play(colour, self._move(name))
        return name

    def _reg_genmove(self, colour: int) -> str:
        recent = [boards.stones for boards in reversed(self._positions[-self._history :])]
        before = [torch.zeros_like(recent[0])] * (self._history - len(recent))
        with torch.no_grad():
            move = self._choose(self._turn(colour), torch.stack([*recent, *before], dim=1), self._seen())
        return vertex(int(move), self._go.size)

    def _undo(self) -> None:
        if not self._moves:
            raise GtpError("cannot undo")
        self._moves.pop()
        self._positions.pop()

    def _showboard(self) -> str:
        last = self._moves[-1] if self._moves else None
        return "\n" + "\n".join(board_lines(self._positions[-1].stones[0].tolist(), self._go.size, last))

    def _turn(self, colour: int) -> Boards:
        """The position with this colour to play, which the protocol leaves to the controller. It knows no end of a game
        either: after two passes play continues as if nobody had passed."""
        boards = self._positions[-1]
        passes = torch.where(boards.passes < 2, boards.passes, 0).to(boards.passes.dtype)
        return boards._replace(to_play=torch.full_like(boards.to_play, colour), passes=passes)

    def _seen(self) -> torch.Tensor:
        return torch.stack([boards.hash for boards in self._positions], dim=1)

    def _move(self, text: str) -> int:
        return parse_vertex(text, self._go.size)


def serve(session: Session, commands: Iterable[str], answers: TextIO) -> None:
    """Answers each command, until `quit` or the end of the input."""
    for line in commands:
        answer = session.answer(line)
        if answer is not None:
            answers.write(answer)
            answers.flush()
        if session.over:
            return


def _parsed(line: str) -> list[str]:
    """Id (or nothing), command (or nothing) and arguments of a line, read as the protocol has it (section 3.1): control
    characters are dropped, a tab is a space, and a comment runs from # to the end."""
    line = re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", "", line).partition("#")[0]
    words = line.split()
    number = words.pop(0) if words and re.fullmatch("[0-9]+", words[0]) else ""
    return [number, *(words or [""])]


def _colour(text: str) -> int:
    colours = {"b": BLACK, "black": BLACK, "w": WHITE, "white": WHITE}
    if text.lower() not in colours:
        raise ValueError(f"invalid color {text!r}")
    return colours[text.lower()]


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("komi not a float")
    return value


def main() -> int:
    """The command. Returns the exit status."""
    return exit_status(_main)


def _main() -> int:
    folder, given = split_arguments(sys.argv[1:], "python -m timetrial_minigo.gtp RUN_FOLDER [simulations=N]")
    settings = validate(Settings, {"simulations": None, **given}, "")
    trained = load(folder)
    simulations = trained.config.simulations if settings.simulations is None else settings.simulations
    serve(
        Session(Go(trained.rules), trained.chooser(simulations), trained.history, trained.name), sys.stdin, sys.stdout
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
