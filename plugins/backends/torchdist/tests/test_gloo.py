"""The gloo backend on real processes."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.api.errors import TimetrialError
from core.api.types import Forward, Quality
from core.testing.cli import run_program
from timetrial_torchdist import process_group
from timetrial_torchdist.buffers import evaluate_alike
from timetrial_torchdist.gloo import probe

RANKS = Path(__file__).with_name("ranks.py")


@pytest.mark.numbers
def test_two_ranks_agree_on_numbers_and_buffers() -> None:
    for rank in run_program(RANKS, "agree", nodes="00"):
        rank.expect(0)


def test_buffers_are_averaged_over_the_ranks_that_hold_the_same_part_of_the_model() -> None:
    for rank in run_program(RANKS, "data_peers", nodes="0000"):
        rank.expect(0)


@pytest.mark.parametrize(("data_size", "sidecar"), [(1, ""), (2, "async_eval")])
def test_one_data_rank_and_a_sidecar_have_nothing_to_average(data_size: int, sidecar: str) -> None:
    """They evaluate as they are; neither may start a collective."""

    def evaluate(infer: Forward) -> Quality:
        return {}

    ctx: Any = SimpleNamespace(data_size=data_size, sidecar=sidecar)
    assert evaluate_alike(ctx, evaluate) is evaluate


def test_a_dead_peer_fails_the_collective_and_does_not_hold_the_shutdown() -> None:
    survivor, dead = run_program(RANKS, "dead_peer", nodes="00")
    survivor.expect(0)
    assert dead.code == -signal.SIGKILL


def test_a_hung_peer_does_not_hold_the_shutdown() -> None:
    survivor, hung = run_program(RANKS, "hung_peer", nodes="00")
    survivor.expect(0)
    assert hung.code == -signal.SIGKILL  # by the survivor, once it has left


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_one_rank_needs_no_launcher() -> None:
    group = process_group.join("gloo", torch.device("cpu"), 60.0)
    try:
        assert (group.rank, group.world_size) == (0, 1)
        assert group.all_gather([0.1]) == [[0.1]]
        assert group.broadcast([1, "two"]) == [1, "two"]
    finally:
        group.shutdown()


@pytest.mark.usefixtures("alone")
def test_ranks_without_an_address_are_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TimetrialError, match=r"rank 1 of 2 could not join.*MASTER_ADDR"):
        process_group.join("gloo", torch.device("cpu"), 60.0)


def test_the_cpu_serves_any_number_of_ranks() -> None:
    devices = probe()
    assert (devices.provides, devices.count, devices.problem) == ({"cpu", "process_group"}, None, "")
