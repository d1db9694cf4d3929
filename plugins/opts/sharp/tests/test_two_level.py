"""The two-level all-reduce on real processes, and on two hosts that a cable joins."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import EXIT_CODES
from core.testing.cli import run_cli
from core.testing.hosts import problem, start_ranks, two_hosts

RANKS = str(Path(__file__).with_name("ranks.py"))
NO_HOSTS = problem()
needs_hosts = pytest.mark.skipif(bool(NO_HOSTS), reason=f"network namespaces: {NO_HOSTS}")
pytestmark = pytest.mark.distributed


def ranks_here(scenario: str, node_of_rank: str) -> list[subprocess.Popen[str]]:
    """A rank for each digit, which says its node; all on this host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(node_of_rank))}
    return [
        subprocess.Popen(
            [sys.executable, RANKS, scenario],
            env={**os.environ, **place, "RANK": str(rank), "GROUP_RANK": node, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, node in enumerate(node_of_rank)
    ]  # fmt: skip


def outputs(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """What each rank printed, when all have ended with this exit status."""
    ended = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == code, errors
    return [printed for printed, _ in ended]


def test_it_gives_the_mean_over_all_ranks_whatever_the_length_and_format() -> None:
    outputs(ranks_here("values", "0101"))


def test_a_dead_peer_fails_the_backward_pass_of_the_others() -> None:
    *survivors, dead = ranks_here("dead_peer", "0011")
    assert all("gloo" in printed.lower() for printed in outputs(survivors))
    assert dead.wait() == -signal.SIGKILL


@needs_hosts
@pytest.mark.parametrize(
    ("placement", "flat"),
    [
        ("0011", 1.5),
        pytest.param("0101", 3.0, marks=pytest.mark.convergence),
        pytest.param("00001111", 1.75, marks=pytest.mark.convergence),  # eight processes
    ],
)
def test_gradients_cross_the_link_once_instead_of_as_a_flat_ring_sends_them(placement: str, flat: float) -> None:
    """Each way, in multiples of the gradients' bytes: a ring of N sends 2 (N-1)/N over each edge, and 0101 has two."""
    with two_hosts() as hosts:
        printed = outputs(start_ranks(hosts, placement, sys.executable, RANKS, "link"))
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


def test_a_size_that_does_not_divide_is_refused_before_any_process_starts(tmp_path: Path) -> None:
    arguments = ("workload=toy", "backend=gloo", "launch.nproc=4", "+opt=sharp", "opt.sharp.ranks_per_node=3")
    refused = run_cli(*arguments, run_dir=tmp_path / "run").expect(2)
    assert "ranks_per_node=3 does not divide 4 ranks" in refused.stderr
    assert not (tmp_path / "run").exists()
