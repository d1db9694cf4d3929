"""The toy workload passes the suite that every workload passes."""

from core.testing.suites import WorkloadSuite


class TestToy(WorkloadSuite):
    name = "toy"
