"""The conformance kit: what every plugin must show, as test classes to inherit, on the real command line.

from core.testing.suites import OptSuite

class TestAmp(OptSuite):
    name = "amp"
"""
