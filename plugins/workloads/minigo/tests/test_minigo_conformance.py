"""What every workload must show, and what is this one's own about stopping and going on: generations of self-play."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.testing.cli import run_ranks
from core.testing.suites import WORKLOAD_CARD, PluginSuite, WorkloadSuite

STEPS_IN_A_GENERATION = 3
SMALL = (
    "games=10", "parallel_games=4", "simulations=4", "move_limit=20", "width=8", "blocks=1", "value_hidden=8",
    "window=2", "epoch_examples=48", "global_batch_size=16", "eval.first=9", "max_epochs=9",
)  # fmt: skip


class TestMiniGo(WorkloadSuite):
    """Two generations and a half; the games of the second and third are played by a trained network."""

    name = "minigo"
    overrides = tuple(f"workload.{setting}" for setting in SMALL)
    steps = 8
    float64 = True  # the last bit of a float32 can choose another move, and so another game

    @pytest.mark.parametrize("every", [STEPS_IN_A_GENERATION, STEPS_IN_A_GENERATION + 1])
    def test_a_run_killed_in_the_middle_of_its_self_play_ends_with_the_same_bits(
        self, tmp_path: Path, every: int
    ) -> None:
        arguments = (*self.arguments, f"stop.steps={self.steps}", f"checkpoint.every_steps={every}")
        killed = run_ranks(*arguments, run_dir=tmp_path / "run", fault="selfplay@3=kill")
        assert killed.code != 0
        assert max((tmp_path / "run" / "checkpoints").glob("step_*")).name == f"step_{6 if every == 3 else 4:08d}"
        resumed = run_ranks(*arguments, run_dir=tmp_path / "run").expect(4)
        assert resumed.result["restarts"] == 1
        assert resumed.result["parameters_sha256"] == self.run().result["parameters_sha256"]
        assert resumed.losses == self.run().losses

    @pytest.mark.distributed
    def test_of_two_ranks_either_can_be_killed_and_the_first_holds_the_window_for_both(self, tmp_path: Path) -> None:
        arguments = (*self.arguments, "launch.nproc=2", "backend=gloo", f"stop.steps={self.steps}")
        every = f"checkpoint.every_steps={STEPS_IN_A_GENERATION + 1}"
        killed = run_ranks(*arguments, every, run_dir=tmp_path / "run", fault="step@5=kill:1")
        assert killed.code != 0
        resumed = run_ranks(*arguments, every, run_dir=tmp_path / "run").expect(4)
        both = self.run("launch.nproc=2", "backend=gloo")
        assert resumed.result["parameters_sha256"] == both.result["parameters_sha256"]


class TestMiniGoMLPerf(PluginSuite):
    kind = "workload"
    name = "minigo_mlperf"
    card_headings = WORKLOAD_CARD
