"""The plugin as core sees it: what it is, and the hook that builds it. Imports without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.api.hooks import hookimpl
from core.api.types import Plugin, WorkloadSpec
from timetrial_resnet.config import ResNetConfig

if TYPE_CHECKING:
    from core.api.types import RunContext
    from timetrial_resnet.workload import ResNetWorkload

SPEC = WorkloadSpec(
    interface=2,
    summary="ResNet image classification: handwritten digits, Fashion-MNIST, ImageNet",
    benchmark="resnet",
    batch_statistics=True,
)


class ResNet(Plugin):
    """Image classification with residual networks: `resnet`, `resnet_fashion` and `resnet_mlperf`."""

    spec = SPEC
    Config = ResNetConfig
    config: ResNetConfig

    @hookimpl
    def make_workload(self, ctx: RunContext) -> ResNetWorkload:
        from timetrial_resnet.workload import ResNetWorkload  # imports torch

        return ResNetWorkload(SPEC, self.config, ctx)
