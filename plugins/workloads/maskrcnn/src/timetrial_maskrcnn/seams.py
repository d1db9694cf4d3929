"""Where opts may act on Mask R-CNN: the parts whose shapes depend on the data. Imports without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from core.api.seams import Seam

if TYPE_CHECKING:
    from torch import Tensor

    Three = tuple[Tensor, Tensor, Tensor]

PROPOSALS: Seam[Callable[..., Three]] = Seam("maskrcnn.proposals")
ANCHOR_TARGETS: Seam[Callable[..., Three]] = Seam("maskrcnn.anchor_targets")
REGION_TARGETS: Seam[Callable[..., Three]] = Seam("maskrcnn.region_targets")
REGION_FEATURES: Seam[Callable[..., Tensor]] = Seam("maskrcnn.region_features")
DETECTIONS: Seam[Callable[..., Three]] = Seam("maskrcnn.detections")
"""These five are documented at their defaults, the functions of the same names in `timetrial_maskrcnn.regions`."""

MASKS: Seam[Callable[[Tensor, Tensor, int, int], list[dict[str, Any]]]] = Seam("maskrcnn.masks")
"""Mask probabilities of one image's boxes as run-length encoded masks; see `timetrial_maskrcnn.evaluation.masks`."""

MIN_SIDE = 1e-3
"""Pixels. Narrower boxes are neither proposals nor detections, as in torchvision."""
