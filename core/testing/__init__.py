"""The conformance kit: what every plugin must show, as test classes to inherit, and the real command line to run them with.

from core.testing.suites import OptSuite

class TestAmp(OptSuite):
    name = "amp"
"""
