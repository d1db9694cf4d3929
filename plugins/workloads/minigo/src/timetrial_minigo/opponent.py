"""Opponents that are not ours, and matches against them: many games in lockstep, our moves in one call.

An opponent gives each game its own player, seeded from the match's seed and the game's number alone, so a game is
the same whichever rank plays it and whatever games are played beside it. Our engine is the referee: it says which moves
are legal (positional superko included) and scores by area (Tromp-Taylor).
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from core.api.errors import TimetrialError, UsageError
from timetrial_minigo.go import BLACK, WHITE, Boards, Go, Rules
from timetrial_minigo.notation import COLOURS, parse_vertex, vertex

RESIGN = -1
Choose = Callable[[Boards, Tensor, Tensor], Tensor]
"""Our side: `(boards, history int8 [N, H, P], seen int64 [N, L]) -> moves int64 [N]`. History begins with the present
position; `seen` holds the hashes of all positions so far, the present one included, padded as `Go.legal` takes them."""


class Player(Protocol):
    """One side of one game, from the empty board on."""

    def receive(self, move: int) -> None:
        """Plays a move that was not its own: the other side's, or one of the opening."""

    def generate(self, legal: Sequence[bool]) -> int:
        """Chooses a move for the side to play, plays it and returns it, or RESIGN. `legal` is the referee's word."""

    def close(self) -> None: ...


class Opponent(Protocol):
    name: str

    def player(self, rules: Rules, move_limit: int, seed: int) -> Player:
        """A player for one game. UsageError where it cannot play by these rules or is not installed."""


@dataclass(frozen=True)
class Game:
    """How one game of a match went. `score` is by area, black minus white minus komi, whatever ended the game."""

    number: int
    colour: int
    """Ours: BLACK in games with an even number, WHITE in the others."""
    moves: tuple[int, ...]
    opening: int
    """How many of the moves were drawn at random before both sides began."""
    score: float
    ending: Literal["score", "move limit", "resignation", "illegal move"]
    """The last two lose the game for the opponent."""

    @property
    def won(self) -> float:
        """By our side: 1, or 0.5 for a draw, which a komi with a fraction rules out."""
        margin = self.score * self.colour if self.ending in ("score", "move limit") else 1.0
        return (np.sign(margin).item() + 1) / 2


def play_match(
    go: Go, choose: Choose, opponent: Opponent, games: Sequence[int], seed: int,
    *, history: int, opening: int, move_limit: int,
) -> list[Game]:  # fmt: skip
    """Plays the games with these numbers, and returns them in that order.

    Games 2k and 2k + 1 begin with the same random opening, of 1 to `opening` stones (0: none), with colours swapped.
    `move_limit` counts all moves; a game that reaches it is scored as it stands. TimetrialError where the opponent
    fails, or refuses a move that is legal here.
    """
    match = Match(go, list(games), seed, history, move_limit)
    with contextlib.ExitStack() as stack, torch.no_grad():
        players: list[Player] = []
        for number in games:
            own_seed = int(np.random.default_rng([seed, number, 1]).integers(2**31))
            players.append(opponent.player(go.rules, move_limit, own_seed))
            stack.callback(players[-1].close)
        play_openings(match, players, opening)
        while len(running := match.running()):
            theirs = running[match.boards.to_play[running].cpu() != match.colours[running]]
            _opponent_moves(match, players, theirs)
            ours = match.running()
            ours = ours[match.boards.to_play[ours].cpu() == match.colours[ours]]
            if len(ours):
                moves = choose(*match.view(ours)).cpu()
                assert match.legal(ours).gather(1, moves[:, None]).all(), "our side chose a move that is not legal"
                for game, move in zip(ours.tolist(), moves.tolist(), strict=True):
                    players[game].receive(move)
                match.play(ours, moves)
    return match.results()


class Match:
    """The games of a match: positions, what came before them, and how each ended."""

    def __init__(self, go: Go, numbers: list[int], seed: int, history: int, move_limit: int) -> None:
        self.go, self.numbers, self.seed, self.move_limit = go, numbers, seed, move_limit
        games = len(numbers)
        self.colours = torch.tensor([BLACK if n % 2 == 0 else WHITE for n in numbers], dtype=torch.int8)
        self.boards = go.start(games)
        stones = self.boards.stones
        self.history = stones.new_zeros(games, history, go.points)
        self.seen = torch.full((games, move_limit + 1), go.NO_POSITION, dtype=torch.int64, device=stones.device)
        self.seen[:, 0] = self.boards.hash
        self.moves: list[list[int]] = [[] for _ in numbers]
        self.opening = [0] * games
        self.lost_by_opponent: dict[int, Literal["resignation", "illegal move"]] = {}

    def running(self) -> Tensor:
        """Indices of the games that are not over."""
        over = self.go.ended(self.boards).tolist()
        limit, lost = self.move_limit, self.lost_by_opponent
        going = (i for i, moves in enumerate(self.moves) if not over[i] and len(moves) < limit and i not in lost)
        return torch.tensor(list(going), dtype=torch.int64)

    def view(self, which: Tensor) -> tuple[Boards, Tensor, Tensor]:
        """What a side may look at, of these games."""
        longest = max(len(self.moves[i]) for i in which.tolist()) + 1
        which = which.to(self.seen.device)
        return Boards(*(f[which] for f in self.boards)), self.history[which], self.seen[which, :longest]

    def legal(self, which: Tensor) -> Tensor:
        """bool [n, A], on the host."""
        boards, _, seen = self.view(which)
        return self.go.legal(boards, seen).cpu()

    def play(self, which: Tensor, moves: Tensor) -> None:
        """Plays a legal move in each of these games."""
        device = self.seen.device
        index = which.to(device)
        boards = self.go.play(Boards(*(f[index] for f in self.boards)), moves.to(device))
        self.boards = Boards(*(f.index_copy(0, index, new) for f, new in zip(self.boards, boards, strict=True)))
        self.history[index] = torch.cat([boards.stones[:, None], self.history[index, :-1]], dim=1)
        for game, move in zip(which.tolist(), moves.tolist(), strict=True):
            self.moves[game].append(move)
        count = torch.tensor([len(self.moves[i]) for i in which.tolist()], device=device)
        self.seen[index, count] = boards.hash

    def results(self) -> list[Game]:
        scores, over = self.go.score(self.boards).tolist(), self.go.ended(self.boards).tolist()
        by_score: list[Literal["score", "move limit"]] = ["score" if ended else "move limit" for ended in over]
        return [
            Game(
                number, int(self.colours[i]), tuple(self.moves[i]), self.opening[i], scores[i],
                self.lost_by_opponent.get(i, by_score[i]),
            )
            for i, number in enumerate(self.numbers)
        ]  # fmt: skip


def play_openings(match: Match, players: Sequence[Player], longest: int) -> None:
    """A random number of random stones, black and white in turn; the draw depends on the pair of games alone. `players`
    are told of them; there are none where both sides are shown the board."""
    if not longest:
        return
    points = match.go.points
    draws = [np.random.default_rng([match.seed, number // 2]) for number in match.numbers]
    match.opening = [int(draw.integers(1, longest + 1)) for draw in draws]
    priority = torch.from_numpy(np.stack([draw.random((longest, points)) for draw in draws]))
    for turn in range(longest):
        which = torch.tensor([i for i, stones in enumerate(match.opening) if stones > turn])
        if len(which):
            moves = (priority[which, turn] * match.legal(which)[:, :points]).argmax(dim=1)
            if players:
                for game, move in zip(which.tolist(), moves.tolist(), strict=True):
                    players[game].receive(move)
            match.play(which, moves)


def _opponent_moves(match: Match, players: list[Player], which: Tensor) -> None:
    if not len(which):
        return
    played: dict[int, int] = {}
    for game, legal in zip(which.tolist(), match.legal(which).tolist(), strict=True):
        move = players[game].generate(legal)
        if move == RESIGN:
            match.lost_by_opponent[game] = "resignation"
        elif not legal[move]:
            match.lost_by_opponent[game] = "illegal move"
        else:
            played[game] = move
    if played:
        match.play(torch.tensor(list(played)), torch.tensor(list(played.values())))


class OpenSpiel:
    """open_spiel's MCTS bot (pyspiel.MCTSBot: UCT, its solver on) with random rollouts.

    open_spiel knows simple ko only and ends a repeated position as a draw. Here superko forbids the repetition: where
    the bot would repeat a position, it plays the move that its search likes best of those that do not.
    """

    def __init__(self, simulations: int, rollouts: int = 1, uct_c: float = 2.0) -> None:
        """`rollouts` random games evaluate a leaf; 2.0 is the exploration constant of open_spiel's own examples.
        UsageError below 2 simulations: the first evaluates the position, the second is the first to know its moves."""
        if simulations < 2:
            raise UsageError(f"open_spiel's MCTS needs 2 simulations or more for each move, not {simulations}")
        self.simulations, self.rollouts, self.uct_c = simulations, rollouts, uct_c
        self.name = f"open_spiel MCTS, {simulations} simulations of {rollouts} random rollout{'s'[: rollouts != 1]}"

    def player(self, rules: Rules, move_limit: int, seed: int) -> Player:
        if rules.suicide:
            raise UsageError("open_spiel forbids suicide: play this opponent with suicide=false")
        import pyspiel

        parameters = {"board_size": rules.size, "komi": rules.komi, "max_game_length": move_limit}
        game = pyspiel.load_game("go", parameters)
        evaluator = pyspiel.RandomRolloutEvaluator(self.rollouts, seed)
        bot = pyspiel.MCTSBot(game, evaluator, self.uct_c, self.simulations, _BOT_MEMORY_MB, True, seed, False)
        return _OpenSpielPlayer(game.new_initial_state(), bot)


_BOT_MEMORY_MB = 1000
"""Bounds the bot's tree, which is thrown away after each move; thousands of simulations stay far below it."""


class _OpenSpielPlayer:
    def __init__(self, state: Any, bot: Any) -> None:
        self._state, self._bot = state, bot

    def receive(self, move: int) -> None:
        self._state.apply_action(move)

    def generate(self, legal: Sequence[bool]) -> int:
        move = self._bot.step(self._state)
        if not legal[move]:  # it would repeat a position
            move = self._best(legal)
        self._state.apply_action(move)
        return move

    def _best(self, legal: Sequence[bool]) -> int:
        """By the bot's own order: proven outcome, then visits, then reward. The pass is always there, and legal."""
        player = self._state.current_player()

        def worth(child: Any) -> tuple[float, int, float]:
            return (child.outcome[player] if child.outcome else 0.0, child.explore_count, child.total_reward)

        children = self._bot.mcts_search(self._state).children
        return max((child for child in children if legal[child.action]), key=worth).action

    def close(self) -> None:
        """It holds nothing but memory."""


class Program:
    """Any program that speaks GTP 2. `{seed}` in an argument of its command is replaced by the game's own seed.

    It is told size and komi; ko and suicide rules are its command line's affair.
    """

    def __init__(self, command: Sequence[str], name: str = "") -> None:
        self.command, self.name = list(command), name or shlex.join(command)

    def player(self, rules: Rules, move_limit: int, seed: int) -> Player:
        return GtpClient([word.replace("{seed}", str(seed)) for word in self.command], rules)


def gnu_go(level: int, rules: Rules) -> Program:
    """GNU Go at a level (1 to 10, its default), under our rules. UsageError where it is not installed.

    The referee takes every stone as alive, so it is told to capture dead ones before it passes; and it must not resign,
    as it does on small boards when it sees one stone in the centre.
    """
    program = shutil.which("gnugo") or shutil.which("gnugo", path="/usr/games")  # Debian's folder, often not in PATH
    if program is None:
        raise UsageError("GNU Go is not installed: install it (Debian package gnugo) or choose another opponent")
    suicide = "--allow-suicide" if rules.suicide else "--forbid-suicide"
    options = f"--chinese-rules --positional-superko {suicide} --play-out-aftermath --capture-all-dead --never-resign"
    command = [program, *f"--mode gtp --quiet --level {level} --seed {{seed}} {options}".split()]
    return Program(command, f"GNU Go level {level}")


class GtpClient:
    """A `Player` that is a process speaking GTP 2 (Go Text Protocol, version 2, draft 2, 2002)."""

    ANSWER_WITHIN_S = 600.0
    """A program that is silent for longer is taken for hung: strong settings on 19x19 think for minutes."""

    def __init__(self, command: Sequence[str], rules: Rules) -> None:
        self._name, self._size, self._to_play, self._buffer = command[0], rules.size, BLACK, b""
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise UsageError(f"cannot start '{self._name}': {error.strerror}; install it or name another") from None
        try:
            for line in (f"boardsize {rules.size}", "clear_board", f"komi {rules.komi:g}"):
                self.ask(line)
        except TimetrialError:
            self.close()
            raise

    def ask(self, line: str) -> str:
        """The program's answer to a command, without the sign before it. TimetrialError where it fails or dies."""
        problem = f"'{self._name}' ended without an answer to '{line}'"
        try:
            self._process.stdin.write(f"{line}\n".encode())  # pyright: ignore[reportOptionalMemberAccess]
            self._process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
        except OSError:
            raise TimetrialError(problem) from None
        answer = self._answer(problem).strip()
        if answer.startswith("="):
            return answer[1:].strip()
        raise TimetrialError(f"'{self._name}' refuses '{line}': {answer.lstrip('? ')}")

    def _answer(self, problem: str) -> str:
        """What comes until the empty line that ends an answer."""
        output = self._process.stdout.fileno()  # pyright: ignore[reportOptionalMemberAccess]
        while b"\n\n" not in self._buffer.lstrip(b"\n"):
            if not select.select([output], [], [], self.ANSWER_WITHIN_S)[0]:
                raise TimetrialError(f"{problem} within {self.ANSWER_WITHIN_S:g} s")
            chunk = os.read(output, 1 << 16)
            if not chunk:
                raise TimetrialError(problem)
            self._buffer += chunk.replace(b"\r", b"")
        answer, _, self._buffer = self._buffer.lstrip(b"\n").partition(b"\n\n")
        return answer.decode(errors="replace")

    def receive(self, move: int) -> None:
        self.ask(f"play {COLOURS[self._to_play]} {vertex(move, self._size)}")
        self._to_play = -self._to_play

    def generate(self, legal: Sequence[bool]) -> int:
        answer = self.ask(f"genmove {COLOURS[self._to_play]}")
        self._to_play = -self._to_play
        if answer.lower() == "resign":
            return RESIGN
        try:
            return parse_vertex(answer, self._size)
        except ValueError as error:
            raise TimetrialError(f"'{self._name}' answers genmove with an {error}") from None

    def close(self) -> None:
        """Ends the process: asks it to, and does not wait for long."""
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self._process.communicate(b"quit\n", timeout=1)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
