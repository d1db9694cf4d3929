"""What every opt must show; it needs two ranks, with and without it."""

from __future__ import annotations

import pytest
import torch

from core.testing.suites import OptSuite, assert_close, cached_run


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch's PowerSGD on CPU ranks fails where it sees a GPU")
class TestPowerSgd(OptSuite):
    """The method that has a state."""

    name = "gradient_compression"
    workload = ("workload=toy", "backend=gloo", "launch.nproc=2")
    settings = ("opt.gradient_compression.method=powersgd", "opt.gradient_compression.start_step=2")
    changes_by = 0.05  # after 10 steps with two of sixteen directions of the gradient sent in each
    rtol = atol = 0.05

    @pytest.mark.numbers
    @pytest.mark.distributed
    def test_two_ranks_give_the_result_of_one(self) -> None:
        alone = cached_run("workload=toy", f"stop.steps={self.steps}").expect(4)  # one rank has nothing to compress
        assert_close(self.run(), alone, rtol=self.rtol, atol=self.atol)
