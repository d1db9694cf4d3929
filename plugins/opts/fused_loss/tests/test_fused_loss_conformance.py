"""What every opt must show, with predictions enough for several chunks on each of two ranks."""

from core.testing.suites import OptSuite


class TestFusedLoss(OptSuite):
    name = "fused_loss"
    workload = (
        "workload=bert",
        "workload.global_batch_size=16",
        "workload.sequence_length=32",
        "workload.eval_every_samples=160",
        "workload.target=0.01",
    )
    settings = ("opt.fused_loss.positions=40",)
    steps = 6
