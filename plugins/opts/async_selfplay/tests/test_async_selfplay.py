"""Each generation is played by the weights that its number says, whichever side is faster; the process neither hides a
failure nor outlives the run."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import psutil
import pytest
import safetensors.torch
import torch

from core.api.mesh import Mesh
from core.api.types import RunContext
from core.compose.plan import RunPlan
from core.engine.build import build_for_inference
from core.engine.sidecar import _Apart
from core.testing.cli import Outcome, environment, run_ranks
from core.testing.suites import cached_run
from timetrial_minigo.seams import Player

# Four steps in each generation.
TINY = (
    "workload=minigo", "workload.width=8", "workload.blocks=1", "workload.games=8", "workload.parallel_games=8",
    "workload.simulations=8", "workload.epoch_examples=128", "workload.global_batch_size=32",
    "workload.eval.first=100", "workload.window=4", "backend=gloo",
)  # fmt: skip


def window(outcome: Outcome) -> dict[str, torch.Tensor]:
    """The games that the newest checkpoint holds, the oldest generation first."""
    folder = max((outcome.run_dir / "checkpoints").glob("step_*"))
    tensors = safetensors.torch.load_file(folder / "rank0.safetensors")
    prefix = "rank0/workload/window/examples/"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def played_untrained(run_dir: Path, generation: int) -> dict[str, torch.Tensor]:
    """A generation of this run by the network that it began with."""
    plan = RunPlan.load(run_dir / "resolved.yaml")
    ctx = RunContext(config=plan.root, run_dir=run_dir, seed=plan.seed)
    ctx.mesh = Mesh(plan.dimensions)
    ctx.backend = _Apart(ctx.mesh, torch.device("cpu"))
    build_for_inference(ctx, replace(plan, plugins=[p for p in plan.plugins if p.kind == "workload"]))
    return cast(Player, ctx.workload).generation(generation)._asdict()


def test_the_second_generation_is_played_by_the_untrained_network_and_the_third_is_not() -> None:
    outcome = cached_run(*TINY, "+opt=async_selfplay", "stop.steps=9").expect(4)
    held = window(outcome)
    starts = dict.fromkeys(held, 0)
    for generation, untrained in ((1, True), (2, True), (3, False)):
        expected = played_untrained(outcome.run_dir, generation)
        parts = {n: held[n][starts[n] : starts[n] + len(t)] for n, t in expected.items()}
        same = all(torch.equal(parts[name], tensor) for name, tensor in expected.items())
        assert same == untrained
        starts = {name: start + len(expected[name]) for name, start in starts.items()}


@pytest.mark.convergence
def test_a_run_that_is_stopped_between_generations_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    arguments = (*TINY, "+opt=async_selfplay")
    undisturbed = run_ranks(*arguments, "stop.epochs=4", run_dir=tmp_path / "undisturbed").expect(4)
    run_ranks(*arguments, "stop.epochs=2", run_dir=tmp_path / "stopped").expect(4)
    source = f"resume={tmp_path / 'stopped'}"
    resumed = run_ranks(*arguments, "stop.epochs=4", source, run_dir=tmp_path / "resumed").expect(4)
    assert resumed.result["parameters_sha256"] == undisturbed.result["parameters_sha256"]


def test_it_goes_with_other_opts_and_their_evidence_holds(tmp_path: Path) -> None:
    outcome = run_ranks(
        *TINY, "+opt=[async_selfplay,async_eval,playout_cap]", "workload.eval.first=1", "workload.eval.every=1",
        "workload.targets.win_rate=1", "workload.eval_games=4", "stop.epochs=3", run_dir=tmp_path / "run",
    ).expect(4)  # fmt: skip
    assert {name for name, e in outcome.evidence.items() if e["active"]} >= {"async_selfplay", "playout_cap"}
    assert outcome.evidence["async_selfplay"]["figures"]["generations"] == 3
    assert outcome.evidence["async_eval"]["figures"]["evaluations"] == 3


def test_synthetic_data_is_refused(tmp_path: Path) -> None:
    refused = run_ranks(*TINY, "data=synthetic", "+opt=async_selfplay", run_dir=tmp_path / "run").expect(2)
    assert refused.failure == "not_offered"
    assert "acts on minigo.generation, which nothing here offers: not workload 'minigo'" in refused.stderr


def test_a_player_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    failed = run_ranks(*TINY, "+opt=async_selfplay", run_dir=tmp_path / "run", fault="selfplay@2=error").expect(1)
    last = failed.stderr.splitlines()[-1]
    assert "the self-play process failed: RuntimeError: injected fault at selfplay, step 2" in last


def start(run_dir: Path) -> tuple[psutil.Process, psutil.Process]:
    """A run that would go on for long, and its player."""
    endless = (*TINY, "workload.max_epochs=1000000", "+opt=async_selfplay", f"run_dir={run_dir}")
    command = [sys.executable, "-m", "core.run", *endless]
    run = psutil.Process(subprocess.Popen(command, stderr=(run_dir.parent / "stderr").open("w"), env=environment()).pid)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or "losses" not in (run_dir / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, (run_dir.parent / "stderr").read_text()
        time.sleep(0.1)
    (player,) = (p for p in run.children() if "spawn_main" in " ".join(p.cmdline()))
    return run, player


def test_a_player_that_dies_is_said_in_one_line(tmp_path: Path) -> None:
    run, player = start(tmp_path / "run")
    player.kill()
    assert run.wait(60) == 1
    assert "the self-play process failed" in (tmp_path / "stderr").read_text().splitlines()[-1]


def test_a_killed_run_leaves_no_player_behind(tmp_path: Path) -> None:
    run, player = start(tmp_path / "run")
    run.kill()
    run.wait(60)
    psutil.wait_procs([player], timeout=60)
    assert not player.is_running()
