"""The plugin as core sees it: what it is, and the hook that builds it. Imports without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.api.config import require_root
from core.api.hooks import hookimpl
from core.api.types import Plugin, WorkloadSpec
from timetrial_resnet.config import ResNetConfig

if TYPE_CHECKING:
    from core.api.types import Plan, RunContext
    from timetrial_resnet.workload import ResNetWorkload

LAYOUT = "name a folder with train/<class>/*.jpg and val/<class>/*.jpg"

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
    def check(self, plan: Plan) -> None:
        if self.config.data_format == "imagefolder":  # IDX files have a default folder
            require_root(plan.root.data, self.config.embedded_data, LAYOUT)

    @hookimpl
    def make_workload(self, ctx: RunContext) -> ResNetWorkload:
        from timetrial_resnet.workload import ResNetWorkload  # imports torch

        return ResNetWorkload(SPEC, self.config, ctx)
