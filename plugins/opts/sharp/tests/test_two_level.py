"""The two-level all-reduce on real processes, and on two hosts that a cable joins."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.api.errors import EXIT_CODES
from core.testing.cli import run_cli, run_program
from core.testing.hosts import problem, start_ranks, two_hosts

RANKS = Path(__file__).with_name("ranks.py")
NO_HOSTS = problem()
needs_hosts = pytest.mark.skipif(bool(NO_HOSTS), reason=f"network namespaces: {NO_HOSTS}")
pytestmark = pytest.mark.distributed


def outputs(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """What each rank printed, when all have ended with this exit status."""
    ended = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == code, errors
    return [printed for printed, _ in ended]


@pytest.mark.numbers
def test_it_gives_the_mean_over_all_ranks_whatever_the_length_and_format() -> None:
    for rank in run_program(RANKS, "values", nodes="0101"):
        rank.expect(0)


def test_where_the_model_is_split_only_ranks_with_the_same_part_average() -> None:
    for rank in run_program(RANKS, "split_model", nodes="0011"):
        rank.expect(0)


def test_a_dead_peer_fails_the_backward_pass_of_the_others() -> None:
    *survivors, dead = run_program(RANKS, "dead_peer", nodes="0011")
    assert all("gloo" in survivor.expect(0).stdout.lower() for survivor in survivors)
    assert dead.code == -signal.SIGKILL


@needs_hosts
@pytest.mark.convergence  # up to eight fresh interpreters
@pytest.mark.parametrize(
    ("placement", "flat"),
    [
        ("0011", 1.5),
        ("0101", 3.0),
        ("00001111", 1.75),
    ],
)
def test_gradients_cross_the_link_once_instead_of_as_a_flat_ring_sends_them(placement: str, flat: float) -> None:
    """Each way, in multiples of the gradients' bytes: a ring of N sends 2 (N-1)/N over each edge, and 0101 has two."""
    with two_hosts() as hosts:
        printed = outputs(start_ranks(hosts, placement, sys.executable, str(RANKS), "link"))
    for sent in map(json.loads, printed):
        assert sent["flat"] == pytest.approx(flat, rel=0.02)
        assert sent["two_level"] == pytest.approx(1.0, rel=0.02)


@needs_hosts
@pytest.mark.convergence
def test_a_run_on_two_hosts_finds_its_nodes_from_the_launcher(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "core.run", "workload=toy", "backend=gloo", "+opt=sharp", "stop.steps=3"]
    with two_hosts() as hosts:
        outputs(start_ranks(hosts, "0101", *command, f"run_dir={tmp_path / 'run'}"), code=EXIT_CODES["not_converged"])
    evidence = json.loads((tmp_path / "run" / "evidence.json").read_text())["end"]
    found = next(e for e in evidence if e["plugin"] == "sharp")
    assert found["active"], found
    assert "2 nodes of 2 ranks (says the launcher)" in found["summary"]
    assert found["figures"]["across_bytes"] * 2 == found["figures"]["gradient_bytes"]


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        (("ranks_per_node=3",), "usage", "ranks_per_node=3 does not divide 4 ranks"),
        (("ranks_per_node=4", "reduction=two_level"), "not_here", "all 4 ranks are on one node"),
    ],
)
def test_nodes_that_cannot_be_are_refused_before_any_process_starts(
    settings: tuple[str, ...], kind: str, words: str, tmp_path: Path
) -> None:
    given = [f"opt.sharp.{setting}" for setting in settings]
    arguments = ("workload=toy", "backend=gloo", "launch.nproc=4", "+opt=sharp", *given)
    refused = run_cli(*arguments, run_dir=tmp_path / "run").expect(2)
    assert refused.failure == kind
    assert words in refused.stderr
    assert not (tmp_path / "run").exists()
