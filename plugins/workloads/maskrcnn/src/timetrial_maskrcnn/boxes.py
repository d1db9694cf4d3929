"""Boxes as offsets from other boxes, and back (R-CNN, appendix C), as torchvision's `BoxCoder` has them.

That class copies constants from the host in each call, for which a GPU's host must wait, and which no graph can hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = tuple[float, float, float, float]
MOST_GROWTH = math.log(1000 / 16)
"""Logarithm of the largest factor by which an offset may stretch a box (Detectron, and the reference)."""


def encode(objects_x4: Tensor, regions_x4: Tensor, weights: Weights) -> Tensor:
    """Offsets [..., 4] of each object from its region: of the centre, in sides of the region, and logarithms of the
    sides' ratios, each times its weight. 0 where a box without area would make it infinite."""
    centre_x2, side_x2 = _centre_and_sides(regions_x4)
    object_centre_x2, object_side_x2 = _centre_and_sides(objects_x4)
    across, down, wide, high = weights
    shift_x2 = (object_centre_x2 - centre_x2) / side_x2
    growth_x2 = torch.log(object_side_x2 / side_x2)
    parts = (shift_x2[..., 0] * across, shift_x2[..., 1] * down, growth_x2[..., 0] * wide, growth_x2[..., 1] * high)
    return torch.nan_to_num(torch.stack(parts, dim=-1), nan=0.0, posinf=0.0, neginf=0.0)


def decode(offsets_x4: Tensor, regions_x4: Tensor, weights: Weights) -> Tensor:
    """The boxes [..., 4] at these offsets from their regions; leading dimensions broadcast."""
    centre_x2, side_x2 = _centre_and_sides(regions_x4)
    across, down, wide, high = weights
    shift_x2 = torch.stack([offsets_x4[..., 0] / across, offsets_x4[..., 1] / down], dim=-1)
    growth_x2 = torch.stack([offsets_x4[..., 2] / wide, offsets_x4[..., 3] / high], dim=-1)
    found_x2 = centre_x2 + shift_x2 * side_x2
    half_x2 = 0.5 * side_x2 * growth_x2.clamp_max(MOST_GROWTH).exp()
    return torch.cat([found_x2 - half_x2, found_x2 + half_x2], dim=-1)


def _centre_and_sides(boxes_x4: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of the centres, widths and heights, each [..., 2]."""
    side_x2 = boxes_x4[..., 2:] - boxes_x4[..., :2]
    return boxes_x4[..., :2] + 0.5 * side_x2, side_x2
