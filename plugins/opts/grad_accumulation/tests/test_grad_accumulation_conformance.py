"""What every opt must show."""

from core.testing.suites import OptSuite


class TestGradAccumulation(OptSuite):
    name = "grad_accumulation"
    settings = ("opt.grad_accumulation.steps=3",)  # does not divide the batch of 64
