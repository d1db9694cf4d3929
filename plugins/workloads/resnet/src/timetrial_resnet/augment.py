"""Random affine augmentation of small images, a whole batch at once.

What is drawn for an example depends on the epoch and the example alone: not on the rank, nor on the batch it falls in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Bounds of uniform draws: shift in pixels, rotation in degrees, scale as a fraction, mirroring or not."""

    max_shift: float
    max_rotation: float
    max_scale: float
    flip: bool

    def draw(self, examples: int, size: int, seed: int) -> Tensor:
        """One epoch's maps from output to input pixels, [examples, 2, 3], for `F.affine_grid`."""
        generator = torch.Generator().manual_seed(seed)
        x, y, turn, zoom, side = torch.rand(5, examples, generator=generator) * 2 - 1
        angle = turn * math.radians(self.max_rotation)
        scale = 1 / (1 + zoom * self.max_scale)
        mirror = torch.where(side < 0, -1.0, 1.0) if self.flip else torch.ones(examples)
        shift = 2 * self.max_shift / size  # grid coordinates run from -1 to 1 over `size` pixels
        cos, sin = scale * angle.cos(), scale * angle.sin()
        return torch.stack([cos * mirror, -sin, x * shift, sin * mirror, cos, y * shift], 1).view(examples, 2, 3)

    def apply(self, images_BCHW: Tensor, maps_B23: Tensor) -> Tensor:
        """The images under their maps, interpolated bilinearly; what comes from outside is black (0)."""
        if not (self.max_shift or self.max_rotation or self.max_scale or self.flip):
            return images_BCHW
        grid = F.affine_grid(maps_B23, list(images_BCHW.shape), align_corners=False)
        return F.grid_sample(images_BCHW, grid, align_corners=False)
