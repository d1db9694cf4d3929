"""What every backend must show."""

from core.testing.suites import BackendSuite


class TestGloo(BackendSuite):
    name = "gloo"
