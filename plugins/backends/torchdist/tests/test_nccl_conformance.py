"""What every backend must show."""

from core.testing.suites import BackendSuite


class TestNccl(BackendSuite):
    name = "nccl"
