"""result_0.txt: what the official checker wants to see, also of a run that was interrupted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.testing.cli import Outcome, run_ranks
from core.testing.suites import TrackerSuite, cached_run

TOY = ("workload=toy", "workload.eval.every=2", "checkpoint.every_steps=20")


class TestMlperf(TrackerSuite):
    name = "mlperf"


def events(outcome: Outcome) -> list[dict[str, Any]]:
    lines = (outcome.run_dir / "result_0.txt").read_text().splitlines()
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


def told(outcome: Outcome) -> list[tuple[str, Any, Any]]:
    """Everything but when, and by which line of code."""
    drop = {"lineno", "file"}
    return [(e["key"], e["value"], {k: v for k, v in e["metadata"].items() if k not in drop}) for e in events(outcome)]


def test_the_official_checker_passes(tmp_path: Path) -> None:
    log = cached_run(*TOY).expect(0).run_dir / "result_0.txt"
    checker = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "1.1.0"]
    done = subprocess.run([*checker, "--werror", str(log)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_blocks_and_evaluations_are_told_in_order_with_their_epochs() -> None:
    run = cached_run(*TOY).expect(0)
    keys = [key for key, _, _ in told(run)]
    assert keys[:2] == ["cache_clear", "init_start"] and keys[-1] == "run_stop"
    assert keys.index("init_stop") + 1 == keys.index("run_start")
    first = keys.index("block_start")
    assert keys[first : first + 5] == ["block_start", "block_stop", "eval_start", "eval_accuracy", "eval_stop"]
    starts = [meta for key, _, meta in told(run) if key == "block_start"]
    assert starts[:2] == [{"first_epoch_num": n, "epoch_count": 2} for n in (1, 3)]
    accuracy = [value for key, value, _ in told(run) if key == "eval_accuracy"]
    assert accuracy[-1] == run.result["quality"]["accuracy"]


@pytest.mark.parametrize("step", [35, 70])
def test_a_killed_and_resumed_run_leaves_the_log_of_an_undisturbed_one(step: int, tmp_path: Path) -> None:
    run_ranks(*TOY, run_dir=tmp_path / "run", fault=f"step@{step}=kill")
    resumed = run_ranks(*TOY, run_dir=tmp_path / "run").expect(0)
    assert told(resumed) == told(cached_run(*TOY))


def test_a_run_that_goes_on_in_another_folder_begins_a_log_there(tmp_path: Path) -> None:
    run_ranks(*TOY, run_dir=tmp_path / "first", fault="step@70=kill")
    second = run_ranks(*TOY, f"resume={tmp_path / 'first'}", run_dir=tmp_path / "second").expect(0)
    keys = [key for key, _, _ in told(second)]
    assert keys[:2] == ["cache_clear", "init_start"]
    assert keys.index("run_start") + 1 == keys.index("block_start")


@pytest.mark.distributed
def test_one_rank_of_two_writes_it() -> None:
    run = cached_run(*TOY, "launch.nproc=2").expect(0)
    assert [key for key, _, _ in told(run)].count("run_start") == 1


def test_without_it_a_run_has_no_log_and_the_same_bits(tmp_path: Path) -> None:
    run = run_ranks(*TOY, "default_trackers=[]", run_dir=tmp_path / "run").expect(0)
    assert not (run.run_dir / "result_0.txt").exists()
    other = cached_run(*TOY).result
    assert run.result["plan_hash"] == other["plan_hash"]
    assert run.result["parameters_sha256"] == other["parameters_sha256"]


def test_a_failed_run_has_no_run_stop(tmp_path: Path) -> None:
    run = run_ranks(*TOY, run_dir=tmp_path / "run", fault="step@30=nan").expect(3)
    assert re.search(r'"key": "run_start"', text := (run.run_dir / "result_0.txt").read_text())
    assert "run_stop" not in text
