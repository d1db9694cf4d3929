"""What every opt must show: on one rank, which it wraps as well."""

from core.testing.suites import OptSuite


class TestDdp(OptSuite):
    name = "ddp"
    workload = ("workload=toy", "backend=gloo")
