"""What every workload must show."""

from core.testing.suites import WORKLOAD_CARD, PluginSuite, WorkloadSuite

SMALL = ("encoder_hidden=32", "predictor_hidden=16", "joint_hidden=24", "global_batch_size=8")


class TestRnnt(WorkloadSuite):
    name = "rnnt"
    overrides = tuple(f"workload.{setting}" for setting in SMALL)
    steps = 6


class TestRnntMLPerf(PluginSuite):
    kind = "workload"
    name = "rnnt_mlperf"
    card_headings = WORKLOAD_CARD
