"""What every opt must show. Both need several ranks."""

from __future__ import annotations

import pytest

from core.testing.suites import OptSuite, assert_close, cached_run


class TestFsdp(OptSuite):
    """On two ranks, with and without it."""

    name = "fsdp"
    workload = ("workload=toy", "backend=gloo", "launch.nproc=2")

    @pytest.mark.numbers
    @pytest.mark.distributed
    def test_two_ranks_give_the_result_of_one(self) -> None:
        alone = cached_run("workload=toy", f"stop.steps={self.steps}").expect(4)
        assert_close(self.run(), alone, rtol=self.rtol, atol=self.atol)


class TestTensorParallel(OptSuite):
    """On four ranks as two times two, for which `ddp` is added, and without it on one."""

    name = "tensor_parallel"
    workload = ("workload=toy", "backend=gloo")
    settings = ("launch.nproc=4",)

    @pytest.mark.numbers
    @pytest.mark.distributed
    def test_two_ranks_give_the_result_of_one(self) -> None:
        """All of one tensor group."""
        run = (*self.workload, f"stop.steps={self.steps}")
        alone, two = cached_run(*run).expect(4), cached_run(*run, "+opt=tensor_parallel", "launch.nproc=2").expect(4)
        assert_close(two, alone, rtol=self.rtol, atol=self.atol)
        assert two.result["mesh"] == {"data": 1, "tensor": 2}
        assert "ddp" not in two.evidence
