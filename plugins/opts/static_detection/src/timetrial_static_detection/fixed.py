"""Region proposals, pooling and final detections with fixed shapes: masks instead of selections, no host in between.

Signatures are those of the workload's defaults at the same seams. Letters: B images, A anchors, n candidates, L levels,
P proposals, R regions, K classes (0 is the background), M objects, D detections. Boxes are (x1, y1, x2, y2) in pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align

from core.api.types import Batch
from timetrial_maskrcnn.seams import MIN_SIDE
from timetrial_static_detection import pasting

EDGE = 2
"""Cells beyond a level that pooling may read."""
LEVEL_EPSILON = 1e-6
"""Of torchvision's choice of a pyramid level."""


class Fixed:
    """The replacements at the seams, and counts of what their limits cut short, kept on the device they arise on."""

    def __init__(self, rounds: int, candidates: int, device: torch.device) -> None:
        self.rounds, self.candidates = rounds, candidates
        self._images, self._unsettled, self._beyond = (torch.zeros((), dtype=torch.int64, device=device) for _ in "123")
        self.crowded = self.pasted = 0

    def figures(self) -> dict[str, int]:
        """Images whose proposals were chosen; suppressions that were cut short; images with more candidates, and with
        more objects, than there is room for; masks encoded."""
        return {
            "images": int(self._images), "unsettled": int(self._unsettled), "over_candidates": int(self._beyond),
            "over_objects": self.crowded, "masks": self.pasted,
        }  # fmt: skip

    def with_room(self, batches: Iterable[Batch], objects: int) -> Iterator[Batch]:
        """The batches with room for `objects` objects an image: zeros fill up, objects beyond are left out, counted."""
        for batch in batches:
            data = dict(batch.data)
            if data["labels"].shape[1] > objects:
                self.crowded += int((data["labels"][:, objects:] > 0).any(1).sum())
            for name in ("boxes", "labels", "masks"):
                kept = data[name][:, :objects]
                data[name] = F.pad(kept, (0, 0) * (kept.ndim - 2) + (0, objects - kept.shape[1]))
            yield dataclasses.replace(batch, data=data)

    def masks(self, masks_Dss: Tensor, boxes_D4: Tensor, height: int, width: int) -> list[dict[str, Any]]:
        """Mask probabilities of boxes of one image as run-length encoded masks of that image."""
        self.pasted += len(boxes_D4)
        return pasting.masks(masks_Dss, boxes_D4, height, width)

    def proposals(
        self, scores_BA: Tensor, boxes_BA4: Tensor, level_sizes: list[int], sizes_B2: Tensor, before: int, after: int,
        iou: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The best `before` anchors of each level, clipped, thinned out level by level to at most `after` an image.

        Returns boxes [B, after, 4], which of them are real [B, after] bool, and their anchors [B, after] int64.
        """
        scores_BLn, anchors_BLn = _best_of_levels(scores_BA, level_sizes, before)
        boxes_BLn4 = _rows(boxes_BA4, anchors_BLn.flatten(1)).view(*anchors_BLn.shape, 4)
        limits_B4 = sizes_B2.flip(-1).repeat(1, 2).to(boxes_BLn4.dtype)
        boxes_BLn4 = torch.minimum(boxes_BLn4.clamp_min(0), limits_B4[:, None, None])
        large_BLn = ((boxes_BLn4[..., 2:] - boxes_BLn4[..., :2]) >= MIN_SIDE).all(-1) & (scores_BLn >= 0)
        kept_BLn, unsettled_BL = suppress(large_BLn, overlap(boxes_BLn4) > iou, self.rounds)
        self._images += len(scores_BA)
        self._unsettled += unsettled_BL.any(1).sum()
        ranked_Bn = scores_BLn.masked_fill(~kept_BLn, -1.0).flatten(1)
        best_BP, index_BP = ranked_Bn.topk(min(after, ranked_Bn.shape[1]), dim=1)
        real_BP, missing = best_BP >= 0, (0, after - best_BP.shape[1])
        # Not by a product with 0, of which NaN would stay: pooling at such a place reads what memory holds there.
        chosen_BP4 = _rows(boxes_BLn4.flatten(1, 2), index_BP).masked_fill(~real_BP[..., None], 0.0)
        origin_BP = anchors_BLn.flatten(1).gather(1, index_BP)
        return F.pad(chosen_BP4, (0, 0, *missing)), F.pad(real_BP, missing), F.pad(origin_BP, missing)

    def region_features(
        self, pool: MultiScaleRoIAlign, features: Mapping[str, Tensor], boxes_BR4: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        """Features [B * R, channels, side, side] of regions, each from its level of the pyramid, by one call.

        The levels are placed below one another on one canvas, each with its last row and column repeated, which is what
        RoIAlign reads within one cell beyond them. (It takes a region to be one cell large at least: of a smaller one
        at the border it reads a second cell, which on a separate map is zero.)
        """
        maps = [features[name] for name in pool.featmap_names]
        scales = [2.0 ** round(math.log2(m.shape[-2] / image_size[0])) for m in maps]
        width = max(m.shape[-1] for m in maps) + EDGE
        canvas = torch.cat([F.pad(m, (0, width - m.shape[-1], 0, EDGE), mode="replicate") for m in maps], dim=2)
        tops = [sum(m.shape[-2] + EDGE for m in maps[:level]) for level in range(len(maps))]
        boxes_N4 = boxes_BR4.flatten(0, 1)
        side_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(-1).sqrt()
        exact_N = pool.canonical_level + torch.log2(side_N / pool.canonical_scale) + LEVEL_EPSILON
        finest, coarsest = (-round(math.log2(scale)) for scale in (scales[0], scales[-1]))
        level_N = (exact_N.floor().clamp(finest, coarsest) - finest).long()
        # Sums over the few levels, since a table of them would have to be copied to the device.
        scale_N = sum((level_N == level) * scale for level, scale in enumerate(scales))
        top_N = sum((level_N == level) * float(top) for level, top in enumerate(tops))
        down_N4 = torch.stack([torch.zeros_like(top_N), top_N] * 2, dim=1)
        image_N = torch.arange(len(boxes_BR4), device=boxes_N4.device).repeat_interleave(
            boxes_BR4.shape[1], output_size=len(boxes_N4)
        )
        rois_N5 = torch.cat([image_N[:, None].to(boxes_N4.dtype), boxes_N4 * scale_N[:, None] + down_N4], dim=1)
        # In float32, as torchvision pools under autocast: half a number's bits do not hold a place in a large image.
        pooled = roi_align(canvas.float(), rois_N5.float(), pool.output_size, 1.0, pool.sampling_ratio)
        return pooled.to(canvas.dtype)

    def detections(
        self, scores_BPK: Tensor, boxes_BPK4: Tensor, real_BP: Tensor, count: int, least: float, iou: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes that score at least `least`, thinned out class by class, an image's best `count`.

        Returns boxes [B, D, 4], scores [B, D] (0 fills up) and labels [B, D] int64.
        """
        classes = scores_BPK.shape[-1]
        large_BPK = (boxes_BPK4[..., 2:] - boxes_BPK4[..., :2] > MIN_SIDE).all(-1)
        may_BPK = (scores_BPK >= least) & real_BP[..., None] & large_BPK
        may_BPK[..., 0] = False  # the background
        ranked_BN = scores_BPK.masked_fill(~may_BPK, -1.0).flatten(1)
        self._beyond += (may_BPK.flatten(1).sum(1) > self.candidates).sum()
        best_Bn, index_Bn = ranked_BN.topk(min(self.candidates, ranked_BN.shape[1]), dim=1)
        boxes_Bn4 = _rows(boxes_BPK4.flatten(1, 2), index_Bn)
        label_Bn = index_Bn % classes
        same_Bnn = label_Bn[:, :, None] == label_Bn[:, None, :]
        kept_Bn, unsettled_B = suppress(best_Bn >= 0, (overlap(boxes_Bn4) > iou) & same_Bnn, self.rounds)
        self._unsettled += unsettled_B.sum()
        score_BD, place_BD = best_Bn.masked_fill(~kept_Bn, 0.0).topk(min(count, best_Bn.shape[1]), dim=1)
        boxes_BD4 = _rows(boxes_Bn4, place_BD).masked_fill((score_BD <= 0)[..., None], 0.0)
        labels_BD = label_Bn.gather(1, place_BD) * (score_BD > 0)
        missing = count - score_BD.shape[1]
        return F.pad(boxes_BD4, (0, 0, 0, missing)), F.pad(score_BD, (0, missing)), F.pad(labels_BD, (0, missing))


def _best_of_levels(scores_BA: Tensor, level_sizes: list[int], before: int) -> tuple[Tensor, Tensor]:
    """Scores (-1 fills up) and indices of each level's best anchors, each [B, L, before], best first."""
    scores, anchors, start = list[Tensor](), list[Tensor](), 0
    for part in scores_BA.split(level_sizes, 1):
        best, index = part.topk(min(before, part.shape[1]), dim=1)
        missing = (0, before - best.shape[1])
        scores.append(F.pad(best, missing, value=-1.0))
        anchors.append(F.pad(index + start, missing))
        start += part.shape[1]
    return torch.stack(scores, dim=1), torch.stack(anchors, dim=1)


def _rows(boxes_Bn4: Tensor, index_Bm: Tensor) -> Tensor:
    """The boxes [B, m, 4] with these indices."""
    return boxes_Bn4.gather(1, index_Bm[..., None].expand(-1, -1, 4))


def overlap(boxes_xn4: Tensor) -> Tensor:
    """Intersection over union [..., n, n] of each box with each."""
    left_xn, top_xn, right_xn, bottom_xn = boxes_xn4.unbind(-1)

    def shared(low_xn: Tensor, high_xn: Tensor) -> Tensor:
        inner = torch.minimum(high_xn.unsqueeze(-1), high_xn.unsqueeze(-2))
        return (inner - torch.maximum(low_xn.unsqueeze(-1), low_xn.unsqueeze(-2))).clamp_min_(0)

    both_xnn = shared(left_xn, right_xn).mul_(shared(top_xn, bottom_xn))
    area_xn = (right_xn - left_xn).clamp_min(0) * (bottom_xn - top_xn).clamp_min(0)
    return both_xnn / (area_xn.unsqueeze(-1) + area_xn.unsqueeze(-2) - both_xnn).clamp_min_(1e-9)


def suppress(may_xn: Tensor, near_xnn: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression by rounds over all boxes at once; `may` [..., n] says which there are, best first.

    A box stays if no better one that stays is `near` it. Whether that holds is known after one round for boxes without
    a better one nearby, and after each further round for boxes that hang on those: the result is exactly the greedy one
    once a round changes nothing. Returns which stay [..., n] bool, and whether the last round still changed any [...].
    """
    # Row i, column j: j is better than i, and may suppress it. Floats, since products of matrices are fast: a sum of
    # ones is 0 or not, whatever the precision.
    better_xnn = (near_xnn & may_xn.unsqueeze(-2)).tril(-1).float()

    def judge(kept_xn: Tensor) -> Tensor:
        return may_xn & (torch.matmul(better_xnn, kept_xn.unsqueeze(-1).float()).squeeze(-1) == 0)

    kept_xn = may_xn
    for _ in range(rounds):
        kept_xn = judge(kept_xn)
    again_xn = judge(kept_xn)
    return again_xn, (again_xn != kept_xn).any(-1)
