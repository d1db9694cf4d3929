"""The gloo backend on real processes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from core.api.errors import TimetrialError
from core.testing.cli import run_program
from timetrial_gloo import process_group
from timetrial_gloo.plugin import probe

RANKS = Path(__file__).with_name("ranks.py")


@pytest.mark.numbers
def test_two_ranks_agree_on_numbers_gradients_and_buffers() -> None:
    for rank in run_program(RANKS, "agree", nodes="00"):
        rank.expect(0)


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
        model = process_group.distribute(nn.Linear(2, 2), group.device, bucket_cap_mb=25.0)
        assert isinstance(model, nn.parallel.DistributedDataParallel)
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
    assert (devices.provides, devices.count, devices.problem) == ({"cpu"}, None, "")
