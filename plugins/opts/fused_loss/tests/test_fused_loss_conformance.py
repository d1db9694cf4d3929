"""What every opt must show, with predictions enough for several chunks on each of two ranks."""

import pytest

from core.testing.suites import OptSuite


@pytest.mark.convergence  # each of its runs reads and tokenises the articles
class TestFusedLoss(OptSuite):
    name = "fused_loss"
    workload = (
        "workload=bert",
        "workload.global_batch_size=16",
        "workload.sequence_length=32",
        "workload.eval.every=160",
        "workload.targets.masked_lm_accuracy=0.001",
    )
    settings = ("opt.fused_loss.positions=40",)
    steps = 6
