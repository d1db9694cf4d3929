"""What every opt must show. The compiler takes most of a minute in each process: run with the long tests."""

import pytest

from core.testing.suites import OptSuite


@pytest.mark.convergence
class TestCompile(OptSuite):
    name = "compile"
