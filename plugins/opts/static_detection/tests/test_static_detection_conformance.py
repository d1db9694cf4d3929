"""What every opt must show."""

from core.testing.suites import OptSuite


class TestStaticDetection(OptSuite):
    name = "static_detection"
    workload = (
        "workload=maskrcnn",
        "workload.train_scenes=40",
        "workload.eval_scenes=8",
        "workload.global_batch_size=4",
        "workload.targets.box_ap=0.000001",
        "workload.targets.mask_ap=0.000001",
        "workload.least_score=0.0001",
        "workload.eval.batch_size=4",
    )
    steps = 6
