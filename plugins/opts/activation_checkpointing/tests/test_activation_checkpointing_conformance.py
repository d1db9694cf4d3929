"""What every opt must show, on a model whose blocks hold more than their input, with batch normalisation."""

from core.testing.suites import OptSuite


class TestActivationCheckpointing(OptSuite):
    name = "activation_checkpointing"
    workload = ("workload=resnet", "workload.width=8", "workload.targets.top1=0.5")
    steps = 4
    rtol = 0.01  # two ranks sum in another order, through batch normalisation, for a few steps
    atol = 0.001
