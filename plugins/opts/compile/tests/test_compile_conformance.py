"""What every opt must show."""

from core.testing.suites import OptSuite


class TestCompile(OptSuite):
    name = "compile"
