"""The plugin as core sees it: what it is, and the hook that builds it. Imports without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.api.errors import UsageError
from core.api.hooks import hookimpl
from core.api.types import Plugin, WorkloadSpec
from timetrial_maskrcnn.config import MaskRCNNConfig

if TYPE_CHECKING:
    from core.api.preparation import Preparation
    from core.api.types import RunContext
    from timetrial_maskrcnn.workload import MaskRCNNWorkload


SPEC = WorkloadSpec(
    interface=2,
    summary="Mask R-CNN detection and segmentation: scenes of handwritten digits, COCO",
    benchmark="maskrcnn",
)


class MaskRCNN(Plugin):
    """Detection and segmentation: `maskrcnn` and `maskrcnn_mlperf`."""

    spec = SPEC
    Config = MaskRCNNConfig
    config: MaskRCNNConfig

    @hookimpl
    def prepare(self, preparation: Preparation) -> dict[str, int]:
        from timetrial_maskrcnn.prepare import prepare

        if self.config.data_set != "coco":
            raise UsageError(f"data_set={self.config.data_set} needs no preparation: use workload=maskrcnn_mlperf")
        return prepare(preparation, self.config)

    @hookimpl
    def make_workload(self, ctx: RunContext) -> MaskRCNNWorkload:
        from timetrial_maskrcnn.workload import MaskRCNNWorkload  # imports torch

        return MaskRCNNWorkload(SPEC, self.config, ctx)
