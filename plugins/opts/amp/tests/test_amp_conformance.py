"""What every opt must show."""

from core.testing.suites import OptSuite


class TestAmp(OptSuite):
    name = "amp"
    changes_by = 0.02  # bfloat16 keeps 8 bits: 0.4 % a value
    rtol = atol = 0.02  # two ranks round other partial sums than one
