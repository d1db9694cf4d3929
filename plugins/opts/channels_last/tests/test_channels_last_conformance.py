"""What every opt must show, on a model that has convolutions."""

from core.testing.suites import OptSuite


class TestChannelsLast(OptSuite):
    name = "channels_last"
    workload = ("workload=resnet", "workload.width=8", "workload.targets.top1=0.5")
    steps = 4
    rtol = 0.01  # another order of summation, through batch normalisation, for a few steps
    atol = 0.001
