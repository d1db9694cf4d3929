"""Runs to the target, as a user types them, in a fresh interpreter. Minutes: `-m convergence`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from core.testing.cli import Outcome, run_fresh

pytestmark = [pytest.mark.convergence, pytest.mark.timeout(900)]  # others may share the cores


def race(tmp_path: Path, *arguments: str) -> Outcome:
    run_dir = tmp_path / "run"
    return run_fresh(*arguments, f"run_dir={run_dir}", cwd=tmp_path, run_dir=run_dir).expect(0)


@pytest.mark.parametrize("arguments", [(), ("workload=bert",)], ids=["default", "bert"])
def test_a_plain_command_reaches_its_target_and_the_official_checkers_pass(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    outcome = race(tmp_path, *arguments)
    assert outcome.result["status"] == "success"
    assert outcome.result["time_to_train_s"] > 0
    checker = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "1.1.0"]
    command = [*checker, "--werror", str(outcome.run_dir / "result_0.txt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    describe = [sys.executable, "-m", "mlperf_logging.system_desc_checker", "run/system.json", "training", "1.1.0"]
    done = subprocess.run(describe, capture_output=True, text=True, cwd=tmp_path)
    assert "checker passed" in done.stdout + done.stderr


def test_two_ranks_with_two_opts_reach_the_target(tmp_path: Path) -> None:
    outcome = race(tmp_path, "workload=resnet", "backend=gloo", "launch.nproc=2", "+opt=[amp,channels_last]")
    assert outcome.result["status"] == "success"
    assert all(evidence["active"] for evidence in outcome.evidence.values())
