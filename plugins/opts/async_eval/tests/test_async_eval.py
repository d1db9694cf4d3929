"""Evaluation beside the training gives the baseline's qualities, and its process neither hides a failure nor outlives
the run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from core.testing.cli import Outcome, environment, run_ranks


def qualities(outcome: Outcome) -> list[tuple[int, float]]:
    """(step, accuracy) of each evaluation."""
    lines = map(json.loads, (outcome.run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["quality"]["accuracy"]) for line in lines if "quality" in line]


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("ranks", "opts"),
    [(1, ""), *(pytest.param(2, opts, marks=pytest.mark.distributed) for opts in ("", "fsdp", "tensor_parallel"))],
)
def test_every_quality_is_the_baselines(ranks: int, opts: str, tmp_path: Path) -> None:
    arguments = (
        "workload=toy", "workload.targets.accuracy=1", "stop.epochs=4", "backend=gloo", f"launch.nproc={ranks}"
    )  # fmt: skip
    baseline = run_ranks(*arguments, f"+opt=[{opts}]", run_dir=tmp_path / "baseline").expect(4)
    also = ",".join(filter(None, (opts, "async_eval")))
    beside = run_ranks(*arguments, f"+opt=[{also}]", run_dir=tmp_path / "beside").expect(4)
    assert len(qualities(baseline)) == 4
    assert qualities(beside) == qualities(baseline)
    assert beside.result["parameters_sha256"] == baseline.result["parameters_sha256"]


def test_the_log_of_a_run_that_ends_in_the_middle_of_a_block_passes_the_official_checker(tmp_path: Path) -> None:
    # A look after every step, so that the target is detected while the next block is being trained.
    outcome = run_ranks("workload=toy", "+opt=async_eval", "log_seconds=0.00001", run_dir=tmp_path / "run").expect(0)
    checker = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "1.1.0"]
    log = str(outcome.run_dir / "result_0.txt")
    checked = subprocess.run([*checker, "--werror", log], capture_output=True, text=True, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_synthetic_data_is_refused(tmp_path: Path) -> None:
    refused = run_ranks("workload=toy", "data=synthetic", "+opt=async_eval", run_dir=tmp_path / "run").expect(2)
    assert refused.failure == "not_offered"
    assert "acts on core.evaluate, which nothing here offers: not workload 'toy'" in refused.stderr


def start(run_dir: Path) -> tuple[psutil.Process, psutil.Process]:
    """A run that would go on for long, and its evaluator."""
    endless = (
        "workload=toy",
        "workload.targets.accuracy=1",
        "workload.max_epochs=1000000",
        "+opt=async_eval",
        f"run_dir={run_dir}",
    )
    command = [sys.executable, "-m", "core.run", *endless]
    run = psutil.Process(subprocess.Popen(command, stderr=(run_dir.parent / "stderr").open("w"), env=environment()).pid)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or "quality" not in (run_dir / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, (run_dir.parent / "stderr").read_text()
        time.sleep(0.1)
    (evaluator,) = (p for p in run.children() if "spawn_main" in " ".join(p.cmdline()))
    return run, evaluator


def test_an_evaluator_that_dies_is_said_in_one_line(tmp_path: Path) -> None:
    run, evaluator = start(tmp_path / "run")
    evaluator.kill()
    assert run.wait(60) == 1
    assert "the evaluator process failed" in (tmp_path / "stderr").read_text().splitlines()[-1]


def test_a_killed_run_leaves_no_evaluator_behind(tmp_path: Path) -> None:
    run, evaluator = start(tmp_path / "run")
    run.kill()
    run.wait(60)
    psutil.wait_procs([evaluator], timeout=60)
    assert not evaluator.is_running()


@pytest.mark.convergence
def test_an_evaluation_of_detections_is_hidden_behind_steps(tmp_path: Path) -> None:
    small = ("workload=maskrcnn", "workload.train_scenes=80", "workload.eval_scenes=20", "workload.global_batch_size=4")
    when = ("workload.eval.first=1", "stop.epochs=2", "workload.least_score=0.0001", "log_seconds=0.1")
    baseline = run_ranks(*small, *when, run_dir=tmp_path / "baseline").expect(4)
    beside = run_ranks(*small, *when, "+opt=async_eval", run_dir=tmp_path / "beside").expect(4)
    figures = beside.evidence["async_eval"]["figures"]
    assert figures["evaluations"] == 2
    assert 0 < figures["overlapped_s"] <= figures["evaluation_s"]
    assert beside.result["quality"] == baseline.result["quality"]
    assert beside.result["parameters_sha256"] == baseline.result["parameters_sha256"]
