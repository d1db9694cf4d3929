"""What every opt must show."""

from core.testing.suites import OptSuite


class TestStreamOverlap(OptSuite):
    name = "stream_overlap"
