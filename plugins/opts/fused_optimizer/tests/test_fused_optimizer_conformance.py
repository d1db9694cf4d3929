"""What every opt must show."""

from core.testing.suites import OptSuite


class TestFusedOptimizer(OptSuite):
    name = "fused_optimizer"
