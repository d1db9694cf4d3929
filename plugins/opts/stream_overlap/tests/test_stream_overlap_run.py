"""Whole runs: the same numbers as without it, and a trace that shows what was hidden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.testing.cli import run_cli
from core.testing.suites import assert_close, cached_run

TWO_RANKS = ("workload=toy", "workload.hidden=256", "backend=gloo", "launch.nproc=2", "stop.steps=20")


@pytest.mark.distributed
def test_two_ranks_train_the_same_bits_and_leave_a_trace_each(tmp_path: Path) -> None:
    without = cached_run(*TWO_RANKS).expect(4)
    opts = ("+opt=stream_overlap", "opt.stream_overlap.trace=true", "opt.stream_overlap.bucket_cap_mib=0.01")
    outcome = run_cli(*TWO_RANKS, *opts, run_dir=tmp_path / "run").expect(4)
    assert outcome.result["parameters_sha256"] == without.result["parameters_sha256"]
    assert outcome.losses == without.losses
    figures = outcome.evidence["stream_overlap"]["figures"]
    assert figures["profiled_steps"] == 3
    assert figures["communication"]["ms_per_step"] > 0
    assert figures["updates"]["ms_per_step"] > 0
    for rank in range(2):
        trace = json.loads((outcome.run_dir / f"stream_overlap_rank{rank}.trace.json").read_text())
        names = {e["name"] for e in trace["traceEvents"]}
        assert names >= {"gloo:all_reduce", "stream_overlap.update", "stream_overlap.prepare", "aten::addmm"}


@pytest.mark.distributed
def test_it_composes_with_accumulation_and_switched_off_parts_say_so() -> None:
    opts = ("+opt=[stream_overlap,grad_accumulation]",)
    without = cached_run(*TWO_RANKS, "+opt=grad_accumulation").expect(4)
    outcome = cached_run(*TWO_RANKS, *opts, "opt.stream_overlap.copies=false", "opt.stream_overlap.evaluation=false")
    assert outcome.expect(4).result["parameters_sha256"] == without.result["parameters_sha256"]
    figures = outcome.evidence["stream_overlap"]["figures"]
    assert figures["input"]["what"] == figures["evaluation"]["what"] == "switched off"
    assert "in the backward pass, one for each bucket" in figures["updates"]["what"]


def test_one_rank_that_ddp_wraps_is_updated_behind_its_exchange() -> None:
    one = ("workload=toy", "workload.hidden=256", "backend=gloo", "stop.steps=20")
    outcome = cached_run(*one, "opt=[ddp,stream_overlap]", "opt.stream_overlap.bucket_cap_mib=0.01").expect(4)
    assert outcome.result["parameters_sha256"] == cached_run(*one).expect(4).result["parameters_sha256"]
    assert (
        "in the backward pass, one for each bucket" in outcome.evidence["stream_overlap"]["figures"]["updates"]["what"]
    )
    assert outcome.evidence["ddp"]["figures"]["bucket_cap_mib"] == pytest.approx(0.01, rel=0.01)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("opt", "settings"), [("gradient_compression", ()), ("sharp", ("launch.nproc=4", "opt.sharp.ranks_per_node=2"))]
)
def test_updates_follow_the_exchange_of_another_opt(opt: str, settings: tuple[str, ...]) -> None:
    alone = cached_run(*TWO_RANKS, f"+opt={opt}", *settings).expect(4)
    both = cached_run(*TWO_RANKS, f"+opt=[{opt},stream_overlap]", *settings).expect(4)
    assert both.evidence[opt]["active"]
    assert "in the backward pass, one for each bucket" in both.evidence["stream_overlap"]["figures"]["updates"]["what"]
    assert_close(both, alone, rtol=1e-4, atol=1e-5)


def test_batches_of_the_warm_up_are_not_counted() -> None:
    outcome = cached_run("workload=toy", "+opt=stream_overlap", "stop.steps=4").expect(4)
    assert outcome.evidence["stream_overlap"]["figures"]["input"]["what"].endswith(
        "of 4 batches were ready when asked for"
    )


def test_what_one_rank_on_a_cpu_has_no_use_for_says_so(tmp_path: Path) -> None:
    short = ("stop.steps=4", "opt.stream_overlap.profile_after=1")
    outcome = run_cli("workload=toy", "+opt=stream_overlap", *short, run_dir=tmp_path / "run").expect(4)
    figures = outcome.evidence["stream_overlap"]["figures"]
    assert figures["updates"]["what"] == "not in the backward pass: one rank on a CPU has nothing to run them beside"
    assert figures["communication"]["what"] == "one rank exchanges nothing"
    assert figures["copies"]["what"] == "a CPU reads batches where they are"
    assert figures["profiled_steps"] == 2  # the run ended within the window
    assert outcome.evidence["stream_overlap"]["numerics"] == "bitwise"


def test_with_everything_switched_off_it_is_refused(tmp_path: Path) -> None:
    off = [f"opt.stream_overlap.{part}=false" for part in ("copies", "evaluation", "gradients", "optimizer")]
    refused = run_cli("workload=toy", "+opt=stream_overlap", *off, run_dir=tmp_path / "run").expect(2)
    assert refused.failure == "usage"
    assert "all parts of opt 'stream_overlap' are switched off: leave it out" in refused.stderr
