"""What every opt must show; this one needs two nodes of two ranks, or its two levels would be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.testing.cli import run_cli
from core.testing.suites import OptSuite, assert_close, cached_run

FOUR_RANKS = ("backend=gloo", "launch.nproc=4")


@pytest.mark.distributed
class TestSharp(OptSuite):
    name = "sharp"
    settings = (*FOUR_RANKS, "opt.sharp.ranks_per_node=2")

    def test_two_ranks_give_the_result_of_one(self, tmp_path: Path) -> None:
        """Not here: with two on a node they are one node, which is refused with the reason."""
        refused = run_cli(*self.arguments, "launch.nproc=2", run_dir=tmp_path / "run").expect(2)
        assert refused.failure == "not_here"
        assert "all 2 ranks are on one node (says opt.sharp.ranks_per_node=2)" in refused.stderr

    @pytest.mark.convergence
    def test_it_gives_the_result_of_the_flat_all_reduce(self) -> None:
        """More exactly than that of one rank, which adds up other parts."""
        flat = cached_run(*self.workload, *FOUR_RANKS, f"stop.steps={self.steps}").expect(4)
        assert_close(self.run(), flat, rtol=1e-5, atol=1e-6)
