"""Who averages the gradients, and with what result."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core.testing.cli import Outcome, run_cli, run_program
from core.testing.suites import cached_run

RANKS = Path(__file__).with_name("ranks.py")
TOY = ("workload=toy", "backend=gloo", "stop.steps=12")
OTHER_EXCHANGE = """
class P(Plugin):
    spec = OptSpec(interface=2, summary="made up", numerics="bitwise", claims=frozenset({"gradient_exchange"}))
    Config = Config
"""


def plan_hash(outcome: Outcome) -> str:
    return OmegaConf.load(outcome.run_dir / "resolved.yaml").plan_hash


@pytest.mark.distributed
def test_two_ranks_get_it_without_asking() -> None:
    outcome = cached_run(*TOY, "launch.nproc=2").expect(4)
    evidence = outcome.evidence["ddp"]
    assert evidence["active"]
    assert evidence["figures"] == {"data_ranks": 2, "bucket_cap_mib": 25.0}
    assert evidence["numerics"] is None


@pytest.mark.distributed
def test_asking_for_it_changes_nothing() -> None:
    without, asked = cached_run(*TOY, "launch.nproc=2").expect(4), cached_run(*TOY, "launch.nproc=2", "opt=[ddp]")
    assert plan_hash(asked.expect(4)) == plan_hash(without)
    assert asked.result["parameters_sha256"] == without.result["parameters_sha256"]
    assert asked.losses == without.losses


@pytest.mark.distributed
def test_its_settings_can_be_given() -> None:
    small = cached_run(*TOY, "launch.nproc=2", "opt=ddp", "opt.ddp.bucket_cap_mib=0.5").expect(4)
    assert small.evidence["ddp"]["figures"]["bucket_cap_mib"] == 0.5
    assert plan_hash(small) != plan_hash(cached_run(*TOY, "launch.nproc=2").expect(4))


def test_one_rank_is_bare_unless_asked_and_keeps_its_bits() -> None:
    bare, wrapped = cached_run(*TOY).expect(4), cached_run(*TOY, "opt=ddp").expect(4)
    assert "ddp" not in bare.evidence
    assert wrapped.evidence["ddp"]["active"]
    assert wrapped.evidence["ddp"]["numerics"] == "bitwise"
    assert wrapped.result["parameters_sha256"] == bare.result["parameters_sha256"]


def test_it_needs_a_process_group(tmp_path: Path) -> None:
    refused = run_cli("workload=toy", "backend=single", "opt=ddp", run_dir=tmp_path / "run").expect(2)
    assert refused.failure == "not_here"


def test_two_exchanges_are_a_conflict_and_another_one_takes_its_place(tmp_path: Path, fake_plugin) -> None:
    site = str(fake_plugin("opt", "parameter_server", OTHER_EXCHANGE))
    both = run_cli(*TOY, "opt=[ddp,parameter_server]", run_dir=tmp_path / "run", PYTHONPATH=site).expect(2)
    assert both.failure == "conflict"
    assert "'ddp' and 'parameter_server' both claim gradient_exchange" in both.stderr


@pytest.mark.numbers
@pytest.mark.distributed
@pytest.mark.parametrize("scenario", ["unequal_shares", "other_opts"])
def test_gradients(scenario: str) -> None:
    for rank in run_program(RANKS, scenario, nodes="00"):
        rank.expect(0)


@pytest.mark.distributed
def test_only_ranks_that_hold_the_same_part_of_the_model_exchange() -> None:
    for rank in run_program(RANKS, "data_peers", nodes="0000"):
        rank.expect(0)
