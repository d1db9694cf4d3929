"""What every workload must show."""

from core.testing.suites import WORKLOAD_CARD, PluginSuite, WorkloadSuite


class TestBert(WorkloadSuite):
    name = "bert"
    overrides = ("workload.global_batch_size=8", "workload.sequence_length=32", "workload.eval.batch_size=256")
    steps = 6


class TestBertMLPerf(PluginSuite):
    kind = "workload"
    name = "bert_mlperf"
    card_headings = WORKLOAD_CARD
