"""What every opt must show, on spoken digits, with chunks smaller than a batch."""

from pathlib import Path

import pytest

from core.testing.cli import run_ranks
from core.testing.suites import OptSuite, assert_close, cached_run


class TestLeanTransducer(OptSuite):
    name = "lean_transducer"
    workload = (
        "workload=rnnt",
        "workload.encoder_hidden=32",
        "workload.predictor_hidden=16",
        "workload.joint_hidden=24",
        "workload.target=1.0",
    )
    settings = ("opt.lean_transducer.chunk=500",)
    steps = 6


PRUNED = (*TestLeanTransducer().arguments, "opt.lean_transducer.mode=pruned", "stop.steps=6")


def test_pruned_its_own_parameters_are_checkpointed_and_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = cached_run(*PRUNED).expect(4)
    assert whole.evidence["lean_transducer"]["active"]
    assert whole.evidence["lean_transducer"]["numerics"] == "changes"
    assert [name for name in whole.parameters if name.startswith("joint.simple.")]
    arguments = (*PRUNED, "checkpoint.every_steps=2")
    assert run_ranks(*arguments, run_dir=tmp_path / "run", fault="step@3=kill").code != 0
    resumed = run_ranks(*arguments, run_dir=tmp_path / "run").expect(4)
    assert resumed.result["parameters_sha256"] == whole.result["parameters_sha256"]


@pytest.mark.distributed
def test_pruned_two_ranks_give_the_result_of_one() -> None:
    both = cached_run(*PRUNED, "launch.nproc=2", "backend=gloo").expect(4)
    assert_close(both, cached_run(*PRUNED).expect(4), rtol=1e-3, atol=1e-4)


@pytest.mark.convergence
@pytest.mark.parametrize("mode", ["exact", "pruned"])
def test_the_recogniser_reaches_its_target(mode: str) -> None:
    outcome = cached_run("workload=rnnt", "+opt=lean_transducer", f"opt.lean_transducer.mode={mode}").expect(0)
    assert outcome.evidence["lean_transducer"]["active"]


def test_with_bfloat16_it_trains_and_is_active() -> None:
    outcome = cached_run(*TestLeanTransducer().workload, "opt=[lean_transducer,amp]", "stop.steps=4").expect(4)
    assert all(found["active"] for found in outcome.evidence.values())
