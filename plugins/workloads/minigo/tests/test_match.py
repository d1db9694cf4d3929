"""The command lines that play a trained network, each in its own process: over GTP, and in matches, legal by the
rules of both sides to the end."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sgfmill import sgf, sgf_moves

import timetrial_minigo
from core.testing.cli import Outcome, environment, run_program
from core.testing.suites import cached_run
from timetrial_minigo.go import Go, Rules
from timetrial_minigo.match import standard_error
from timetrial_minigo.opponent import GtpClient, gnu_go

GNU_GO = shutil.which("gnugo") or shutil.which("gnugo", path="/usr/games")
needs_gnu_go = pytest.mark.skipif(not GNU_GO, reason="GNU Go is not installed")
TINY = (
    "workload=minigo", "workload.width=8", "workload.blocks=1", "workload.games=8", "workload.parallel_games=8",
    "workload.simulations=4", "workload.epoch_examples=128", "workload.global_batch_size=32", "stop.steps=4",
)  # fmt: skip
RULES = Rules(5, 0.5)


@pytest.fixture(scope="module")
def run_dir() -> Path:
    """A run of one short generation."""
    return cached_run(*TINY).expect(4).run_dir


def command(module: str, *arguments: object) -> Outcome:
    """`python -m timetrial_minigo.MODULE ARGUMENTS`, in a forked process."""
    program = Path(timetrial_minigo.__file__).with_name(f"{module}.py")
    (done,) = run_program(program, *map(str, arguments), nodes="0")
    return done


def records(folder: Path) -> list[sgf.Sgf_game]:
    return [sgf.Sgf_game.from_bytes(path.read_bytes()) for path in sorted(folder.glob("*.sgf"))]


def moves_of(record: sgf.Sgf_game) -> list[int]:
    _, plays = sgf_moves.get_setup_and_moves(record)
    return [25 if point is None else point[0] * 5 + point[1] for _, point in plays]


def ends_by_our_rules(moves: list[int]) -> bool:
    """Plays the moves, each of which must be legal; whether the game is then over."""
    go, hashes = Go(RULES), []
    boards = go.start(1)
    for move in moves:
        hashes.append(boards.hash)
        assert go.legal(boards, torch.stack(hashes, 1))[0, move]
        boards = go.play(boards, torch.tensor([move]))
    return bool(go.ended(boards))


def test_the_engine_answers_over_gtp(run_dir: Path) -> None:
    lines = ["1 protocol_version", "2 boardsize 5", "3 genmove black", "4 genmove b", "5 boardsize 9", "", "6 quit"]
    engine = [sys.executable, "-m", "timetrial_minigo.gtp", str(run_dir), "simulations=8"]
    stdin = "\n".join(lines) + "\n"
    done = subprocess.run(engine, input=stdin, capture_output=True, text=True, timeout=250, env=environment())
    answers = done.stdout.split("\n\n")
    assert done.returncode == 0, done.stderr
    assert answers[:2] == ["=1 2", "=2 "]
    assert [answer[:3] for answer in answers[2:4]] == ["=3 ", "=4 "]
    assert answers[4:] == ["?5 unacceptable size", "=6 ", ""]


def test_two_of_our_engines_play_a_game_with_each_other(run_dir: Path) -> None:
    """As GNU Go's twogtp does: each is told what the other has played, and both come to the same end."""
    players = [
        GtpClient([sys.executable, "-m", "timetrial_minigo.gtp", str(run_dir), f"simulations={n}"], RULES)
        for n in (0, 4)
    ]
    try:
        moves: list[int] = []
        while moves[-2:] != [25, 25] and len(moves) < 60:
            mover, other = players[len(moves) % 2], players[1 - len(moves) % 2]
            moves.append(mover.generate([]))
            other.receive(moves[-1])
        assert players[0].ask("final_score") == players[1].ask("final_score")
        assert players[0].ask("showboard") == players[1].ask("showboard")
    finally:
        for player in players:
            player.close()
    assert ends_by_our_rules(moves) == (moves[-2:] == [25, 25])


@needs_gnu_go
def test_a_full_game_against_gnu_go_is_legal_to_the_end_by_both_sides_rules(run_dir: Path, tmp_path: Path) -> None:
    """A third process, of GNU Go, judges the records: it refuses a move that is not legal."""
    done = command("match", run_dir, "games=2", "opponent=gnugo", "level=1", "simulations=4", f"sgf={tmp_path}")
    done.expect(0)
    played = records(tmp_path)
    assert len(played) == 2
    for record in played:
        moves, judge = moves_of(record), gnu_go(1, RULES).player(RULES, 100, seed=1)
        try:
            for move in moves:
                judge.receive(move)
        finally:
            judge.close()
        assert ends_by_our_rules(moves)
        assert {record.get_player_name("b"), record.get_player_name("w")} >= {"GNU Go level 1"}


@needs_gnu_go
def test_a_match_prints_a_table_and_a_board(run_dir: Path, tmp_path: Path) -> None:
    done = command("match", run_dir, "games=4", "simulations=0", f"sgf={tmp_path}")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(("  black", "  white", "  both"))] == [
        ["black", "2"], ["white", "2"], ["both", "4"],
    ]  # fmt: skip
    assert "standard error" in done.stdout
    assert "   A B C D E" in lines
    assert lines[-1] == f"records: {tmp_path}"


def test_a_match_against_any_gtp_program_is_the_same_twice(run_dir: Path, tmp_path: Path) -> None:
    other = shlex.join([sys.executable, "-m", "timetrial_minigo.gtp", str(run_dir), "simulations=0"])
    for folder in ("one", "two"):
        done = command("match", run_dir, "games=2", f"opponent={other}", "simulations=2", f"sgf={tmp_path / folder}")
        done.expect(0)
    assert len(records(tmp_path / "one")) == 2
    assert [moves_of(r) for r in records(tmp_path / "one")] == [moves_of(r) for r in records(tmp_path / "two")]


@pytest.mark.parametrize(
    ("module", "arguments", "problem"),
    [
        ("gtp", [], "usage: python -m timetrial_minigo.gtp RUN_FOLDER"),
        ("gtp", ["RUN", "simulation=1"], "did you mean 'simulations'?"),
        ("gtp", ["RUN", "simulations=-1"], "out of range"),
        ("gtp", ["nowhere"], "nowhere is not a run folder"),
        ("match", ["RUN", "opponent=no-such-program"], "cannot start 'no-such-program'"),
        ("match", ["RUN", "opponent=' '"], "opponent= is empty"),
        ("match", ["RUN", "games=0"], "out of range"),
    ],
)
def test_a_mistake_ends_in_one_line(run_dir: Path, module: str, arguments: list[str], problem: str) -> None:
    done = command(module, *(str(run_dir) if word == "RUN" else word for word in arguments))
    done.expect(2)
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_of_another_workload_is_refused() -> None:
    toy = cached_run("workload=toy", "stop.steps=1").expect(4).run_dir
    done = command("gtp", toy)
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert "is a run of workload 'toy'" in done.stderr


def test_a_run_without_a_checkpoint_is_refused(run_dir: Path, tmp_path: Path) -> None:
    shutil.copy(run_dir / "resolved.yaml", tmp_path)
    done = command("gtp", tmp_path)
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert "no trained network" in done.stderr


def test_the_standard_error_is_that_of_a_share() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 10) == 0.0
