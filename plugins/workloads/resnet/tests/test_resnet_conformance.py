"""What every workload must show."""

from core.testing.suites import WORKLOAD_CARD, PluginSuite, WorkloadSuite


class TestResNet(WorkloadSuite):
    name = "resnet"
    overrides = ("workload.width=8",)
    steps = 6
    rtol = 0.01  # another order of summation, through batch normalisation, for a few steps
    atol = 0.001


class TestResNetFashion(PluginSuite):
    kind = "workload"
    name = "resnet_fashion"
    card_headings = WORKLOAD_CARD


class TestResNetMLPerf(PluginSuite):
    kind = "workload"
    name = "resnet_mlperf"
    card_headings = WORKLOAD_CARD
