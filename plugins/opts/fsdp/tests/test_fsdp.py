"""Sharding on real processes, and what a checkpoint makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.testing.cli import run_cli, run_program
from core.testing.suites import assert_close, cached_run

pytestmark = pytest.mark.numbers

TWO_RANKS = ("backend=gloo", "launch.nproc=2")


@pytest.mark.distributed
def test_two_ranks_shard_train_and_evaluate() -> None:
    for rank in run_program(Path(__file__).with_name("ranks.py"), nodes="00"):
        rank.expect(0)


@pytest.mark.distributed
def test_a_model_with_batch_normalisation_trains_as_without_and_each_rank_holds_half() -> None:
    run = ("workload=resnet", "workload.width=8", "stop.steps=4", *TWO_RANKS)
    plain, mine = cached_run(*run).expect(4), cached_run(*run, "+opt=fsdp").expect(4)
    assert_close(mine, plain, rtol=1e-3, atol=1e-4)
    evidence = mine.evidence["fsdp"]
    assert evidence["active"], evidence
    parameters, state = evidence["figures"]["parameters"], evidence["figures"]["optimizer_state"]
    assert parameters["local"] * 2 == pytest.approx(parameters["whole"], rel=0.01)
    assert state == parameters  # momentum, like the parameters
    assert evidence["figures"]["groups"] == 4


@pytest.mark.distributed
def test_a_sharded_runs_checkpoint_is_whole_and_serves_any_run(tmp_path: Path) -> None:
    """Names and shapes are the baseline's; the same run goes on without the opt, on one rank."""
    mine = run_cli("workload=toy", *TWO_RANKS, "+opt=fsdp", "stop.steps=6", run_dir=tmp_path / "run").expect(4)
    plain = cached_run("workload=toy", "stop.steps=12").expect(4)
    assert {n: t.shape for n, t in mine.parameters.items()} == {n: t.shape for n, t in plain.parameters.items()}
    more = ("stop.steps=12", "resume_changed=true")
    continued = run_cli("workload=toy", *more, run_dir=tmp_path / "run").expect(4)
    assert_close(continued, plain, rtol=1e-3, atol=1e-4)


def test_one_rank_has_nothing_to_shard(tmp_path: Path) -> None:
    refused = run_cli("workload=toy", "+opt=fsdp", run_dir=tmp_path / "run").expect(2)
    assert "requires multi_rank" in refused.stderr


def test_another_owner_of_the_gradient_exchange_is_refused(tmp_path: Path) -> None:
    run = ("workload=toy", *TWO_RANKS, "+opt=[fsdp,gradient_compression]")
    assert "both claim ddp.comm_hook" in run_cli(*run, run_dir=tmp_path / "run").expect(2).stderr
