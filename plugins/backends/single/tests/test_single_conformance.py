"""What every backend must show."""

from core.testing.suites import BackendSuite


class TestSingle(BackendSuite):
    name = "single"
