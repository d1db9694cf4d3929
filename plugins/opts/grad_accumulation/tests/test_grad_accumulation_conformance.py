"""What every opt must show."""

import pytest

from core.testing.suites import OptSuite


class TestGradAccumulation(OptSuite):
    name = "grad_accumulation"
    settings = ("opt.grad_accumulation.steps=3",)  # does not divide the batch of 64

    @pytest.mark.distributed
    def test_two_ranks_exchange_once_a_step_and_the_log_has_the_number_of_micro_batches(self) -> None:
        both = self.run("launch.nproc=2", "backend=gloo")
        assert both.evidence["ddp"]["active"]
        assert "gradients exchanged once a step" in both.evidence["grad_accumulation"]["summary"]
        log = (both.run_dir / "result_0.txt").read_text()
        assert '"gradient_accumulation_steps", "value": 3,' in log
