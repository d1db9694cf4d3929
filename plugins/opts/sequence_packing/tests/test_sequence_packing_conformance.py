"""What every opt must show, on real text of which about half is padding."""

import pytest

from core.testing.suites import OptSuite


@pytest.mark.convergence  # each of its runs reads and tokenises the articles
class TestSequencePacking(OptSuite):
    name = "sequence_packing"
    workload = (
        "workload=bert",
        "workload.sequence_length=256",
        "workload.max_positions=256",
        "workload.short_probability=1.0",
        "workload.init_checkpoint=null",
        "workload.global_batch_size=8",
        "workload.eval.batch_size=64",
        "workload.eval.every=64",
        "workload.targets.masked_lm_accuracy=0.001",
    )
    steps = 6
