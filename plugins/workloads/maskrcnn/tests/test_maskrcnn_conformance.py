"""What every workload must show."""

from core.testing.suites import WorkloadSuite


class TestMaskRCNN(WorkloadSuite):
    name = "maskrcnn"
    overrides = ("workload.train_scenes=40", "workload.eval_scenes=8", "workload.global_batch_size=4")
    steps = 6
