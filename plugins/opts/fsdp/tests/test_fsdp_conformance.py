"""What every opt must show; it needs two ranks, with and without it."""

from __future__ import annotations

import pytest

from core.testing.suites import OptSuite, assert_close, cached_run


class TestFsdp(OptSuite):
    name = "fsdp"
    workload = ("workload=toy", "backend=gloo", "launch.nproc=2")

    @pytest.mark.distributed
    def test_two_ranks_give_the_result_of_one(self) -> None:
        alone = cached_run("workload=toy", f"stop.steps={self.steps}").expect(4)
        assert_close(self.run(), alone, rtol=self.rtol, atol=self.atol)
