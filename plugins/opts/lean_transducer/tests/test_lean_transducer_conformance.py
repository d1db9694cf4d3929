"""What every opt must show, on spoken digits, with chunks smaller than a batch."""

from pathlib import Path

import pytest
import torch

from core.testing.cli import run_ranks
from core.testing.suites import OptSuite, assert_close, cached_run

pytestmark = pytest.mark.convergence  # each of its runs reads spoken digits, the first one speaks them


class TestLeanTransducer(OptSuite):
    name = "lean_transducer"
    workload = (
        "workload=rnnt",
        "workload.encoder_hidden=32",
        "workload.predictor_hidden=16",
        "workload.joint_hidden=24",
        "workload.targets.word_error_rate=1.0",
    )
    settings = ("opt.lean_transducer.chunk=500",)
    steps = 6


SMALL = (*TestLeanTransducer().arguments, "stop.steps=6")
PRUNED = (*SMALL, "opt.lean_transducer.mode=pruned")
DROPOUT = (*SMALL, "workload.joint_dropout=0.3")


@pytest.mark.parametrize("arguments", [PRUNED, DROPOUT], ids=["pruned", "dropout"])
def test_what_changes_the_numbers_says_so_and_is_resumed_with_the_same_bits(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    whole = cached_run(*arguments).expect(4)
    assert whole.evidence["lean_transducer"]["active"]
    assert whole.evidence["lean_transducer"]["numerics"] == "changes"
    saving = (*arguments, "checkpoint.every_steps=2")
    assert run_ranks(*saving, run_dir=tmp_path / "run", fault="step@3=kill").code != 0
    resumed = run_ranks(*saving, run_dir=tmp_path / "run").expect(4)
    assert resumed.result["parameters_sha256"] == whole.result["parameters_sha256"]


def test_the_simple_joints_parameters_are_trained_and_checkpointed() -> None:
    first, last = (cached_run(*PRUNED, f"stop.steps={n}").expect(4).parameters for n in (1, 6))
    names = [name for name in last if name.startswith("joint.simple.")]
    assert len(names) == 3 and not any(torch.equal(first[name], last[name]) for name in names)


@pytest.mark.distributed
def test_pruned_two_ranks_give_the_result_of_one() -> None:
    both = cached_run(*PRUNED, "launch.nproc=2", "backend=gloo").expect(4)
    assert_close(both, cached_run(*PRUNED).expect(4), rtol=1e-3, atol=1e-4)


@pytest.mark.distributed
def test_pruned_in_bfloat16_and_on_two_ranks_the_recogniser_reaches_its_target() -> None:
    """All that changes the numbers at once; what `mode=exact` computes, other tests compare with the plain loss."""
    outcome = cached_run(
        "workload=rnnt", "opt=[lean_transducer,amp]", "opt.lean_transducer.mode=pruned", "launch.nproc=2",
        "backend=gloo",
    ).expect(0)  # fmt: skip
    assert all(found["active"] for found in outcome.evidence.values())


def test_with_bfloat16_it_trains_and_is_active() -> None:
    outcome = cached_run(*TestLeanTransducer().workload, "opt=[lean_transducer,amp]", "stop.steps=4").expect(4)
    assert all(found["active"] for found in outcome.evidence.values())
