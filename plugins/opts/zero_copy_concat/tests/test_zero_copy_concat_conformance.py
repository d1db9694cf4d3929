"""What every opt must show, on the smallest workload that has attention."""

from core.testing.suites import OptSuite


class TestZeroCopyConcat(OptSuite):
    name = "zero_copy_concat"
    workload = ("workload=bert",)
