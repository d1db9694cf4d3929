"""What every opt must show, on the smallest workload that has attention."""

import pytest

from core.testing.suites import OptSuite


@pytest.mark.convergence  # each of its runs reads and tokenises the articles
class TestZeroCopyConcat(OptSuite):
    name = "zero_copy_concat"
    workload = (
        "workload=bert",
        "workload.global_batch_size=16",
        "workload.sequence_length=32",
        "workload.eval.every=160",
        "workload.targets.masked_lm_accuracy=0.001",
    )
    steps = 6
