"""What every workload must show."""

from core.testing.suites import WorkloadSuite


class TestMaskRCNN(WorkloadSuite):
    name = "maskrcnn"
    overrides = ("workload.train_scenes=40", "workload.eval_scenes=8", "workload.global_batch_size=4")
    steps = 6
    # No proposal is left out for its overlap, which the last bit could decide; and at the recipe's learning rate steps
    # themselves amplify a difference of rounding.
    compared = ("workload.proposals_train=400", "workload.rpn_nms_iou=1", "workload.base_learning_rate=0.005")
