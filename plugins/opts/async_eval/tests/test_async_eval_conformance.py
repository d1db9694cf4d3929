"""What every opt must show."""

from core.testing.suites import OptSuite


class TestAsyncEval(OptSuite):
    name = "async_eval"
