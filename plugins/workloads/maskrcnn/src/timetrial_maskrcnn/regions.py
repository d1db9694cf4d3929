"""Which boxes a detector learns from and which it returns: matching, sampling, and non-maximum suppression.

Each function here is offered at a seam (`Parts`), so that an opt can replace it. All take and return
tensors of fixed shapes, filled up where an image has fewer; letters: B images, A anchors, M objects of an image
(label 0 fills up), P proposals, R regions for the heads, K classes (0 is the background), D detections.
Boxes are (x1, y1, x2, y2) in pixels of the padded image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import ops
from torchvision.ops import MultiScaleRoIAlign

from core.api.seams import Seam
from timetrial_maskrcnn import seams
from timetrial_maskrcnn.seams import MIN_SIDE


@dataclass(frozen=True)
class Parts:
    """The replaceable parts of the detector, each documented at its default."""

    proposals: Callable[..., tuple[Tensor, Tensor, Tensor]]
    anchor_targets: Callable[..., tuple[Tensor, Tensor, Tensor]]
    region_targets: Callable[..., tuple[Tensor, Tensor, Tensor]]
    region_features: Callable[..., Tensor]
    detections: Callable[..., tuple[Tensor, Tensor, Tensor]]


def offered(offer: Callable[[Seam[Any], Any], Any]) -> Parts:
    """The parts, once `offer` (of the run's context) has offered each to the opts."""
    return Parts(
        offer(seams.PROPOSALS, proposals),
        offer(seams.ANCHOR_TARGETS, anchor_targets),
        offer(seams.REGION_TARGETS, region_targets),
        offer(seams.REGION_FEATURES, region_features),
        offer(seams.DETECTIONS, detections),
    )


# -------------------------------------------------------------------------------------------------- region proposals


def proposals(
    scores_BA: Tensor, boxes_BA4: Tensor, level_sizes: list[int], sizes_B2: Tensor, before: int, after: int, iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The best `before` anchors of each level, clipped to the image, thinned out to at most `after` an image.

    `sizes_B2` are heights and widths. Returns boxes [B, after, 4], which of them are real [B, after] bool, and the
    anchors that they come from [B, after] int64.
    """
    chosen_Bn, level_n = best_of_levels(scores_BA, level_sizes, before)
    found, origins = list[Tensor](), list[Tensor]()
    for scores_A, boxes_A4, chosen_n, size in zip(scores_BA, boxes_BA4, chosen_Bn, sizes_B2, strict=True):
        boxes_n4 = clip(boxes_A4[chosen_n], size)
        large_n = ops.remove_small_boxes(boxes_n4, MIN_SIDE)
        boxes_n4, chosen_n, levels_n = boxes_n4[large_n], chosen_n[large_n], level_n[large_n]
        # In float64: batched_nms moves each level's boxes to a place of their own, where float32 would round them.
        kept = ops.batched_nms(boxes_n4.double(), scores_A[chosen_n].double(), levels_n, iou)[:after]
        found.append(boxes_n4[kept])
        origins.append(chosen_n[kept])
    real = fill_up([torch.ones(len(f), device=f.device) for f in found], after) > 0
    return fill_up(found, after), real, fill_up(origins, after)


def best_of_levels(scores_BA: Tensor, level_sizes: list[int], before: int) -> tuple[Tensor, Tensor]:
    """Indices [B, n] of the `before` best anchors of each level, and the level [n] of each."""
    chosen: list[Tensor] = []
    start = 0
    for size in level_sizes:
        chosen.append(scores_BA[:, start : start + size].topk(min(before, size), dim=1).indices + start)
        start += size
    levels = [torch.full((c.shape[1],), i, device=scores_BA.device) for i, c in enumerate(chosen)]
    return torch.cat(chosen, dim=1), torch.cat(levels)


def clip(boxes_x4: Tensor, size_2: Tensor) -> Tensor:
    """Boxes within the image; `size_2` is its height and width, with leading dimensions that broadcast."""
    width_height = size_2.flip(-1).to(boxes_x4.dtype)
    return torch.minimum(boxes_x4.clamp_min(0), torch.cat([width_height, width_height], dim=-1))


def fill_up(rows: list[Tensor], length: int) -> Tensor:
    """The tensors as one batch, zeros behind the shorter ones."""
    whole = rows[0].new_zeros((len(rows), length, *rows[0].shape[1:]))
    for into, row in zip(whole, rows, strict=True):
        into[: len(row)] = row
    return whole


# ----------------------------------------------------------------------------------------------- matching, sampling


def overlaps(boxes_Bn4: Tensor, objects_BM4: Tensor, labels_BM: Tensor) -> Tensor:
    """Intersection over union [B, M, n]; -1 where there is no object."""
    top_left = torch.maximum(boxes_Bn4[:, None, :, :2], objects_BM4[:, :, None, :2])
    bottom_right = torch.minimum(boxes_Bn4[:, None, :, 2:], objects_BM4[:, :, None, 2:])
    shared_BMn = (bottom_right - top_left).clamp_min(0).prod(-1)
    areas = area(objects_BM4)[:, :, None] + area(boxes_Bn4)[:, None, :]
    iou_BMn = shared_BMn / (areas - shared_BMn).clamp_min(1e-9)  # boxes without area overlap nothing
    return iou_BMn.masked_fill(labels_BM[:, :, None] == 0, -1.0)


def area(boxes_x4: Tensor) -> Tensor:
    return (boxes_x4[..., 2:] - boxes_x4[..., :2]).clamp_min(0).prod(-1)


def anchor_targets(
    anchors_A4: Tensor, objects_BM4: Tensor, labels_BM: Tensor, seeds_B: Tensor, budget: int, fraction: float,
    high: float, low: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Which anchors to learn from: `budget` an image, of which at most `fraction` are of an object.

    An anchor is of an object if they overlap by `high`, or if none overlaps the object more (Faster R-CNN, section
    3.1.2); of the background below `low`. Returns sampled foreground and background [B, A] bool, objects [B, A] int64.
    """
    iou_BMA = overlaps(anchors_A4.expand(len(objects_BM4), -1, -1), objects_BM4, labels_BM)
    best_BA, object_BA = iou_BMA.max(dim=1)
    closest_BMA = (iou_BMA == iou_BMA.amax(dim=2, keepdim=True)) & (iou_BMA > 0)
    foreground_BA = (best_BA >= high) | closest_BMA.any(dim=1)
    background_BA = (best_BA < low) & ~foreground_BA
    draw_BA = draws(seeds_B, torch.arange(len(anchors_A4), device=seeds_B.device))
    foreground_BA = sample(foreground_BA, draw_BA, torch.full_like(seeds_B, int(budget * fraction)), budget)
    background_BA = sample(background_BA, draw_BA, budget - foreground_BA.sum(1), budget)
    return foreground_BA, background_BA, object_BA


def sample(of_Bn: Tensor, draw_Bn: Tensor, count_B: Tensor, most: int) -> Tensor:
    """`count_B` (at most `most`) of those in `of_Bn` [B, n] bool, by largest draw."""
    order = draw_Bn.masked_fill(~of_Bn, -1.0).topk(min(most, of_Bn.shape[1]), dim=1).indices
    wanted = torch.arange(order.shape[1], device=order.device) < count_B[:, None]
    return torch.zeros_like(of_Bn).scatter(1, order, wanted) & of_Bn


def region_targets(
    proposals_BP4: Tensor, real_BP: Tensor, anchors_BP: Tensor, objects_BM4: Tensor, labels_BM: Tensor, seeds_B: Tensor,
    budget: int, fraction: float, high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`budget` regions an image for the heads to learn from, of which at most `fraction` are of an object: foreground
    first. The objects themselves are proposals, too (as in the reference). A proposal's draw is that of its anchor, not
    of its rank: where rounding moves or removes a proposal, the choice among the others stays.

    Returns regions [B, R, 4], labels [B, R] int64 (0 background, -1 nothing) and objects [B, R] int64.
    """
    boxes_Bn4 = torch.cat([proposals_BP4, objects_BM4], dim=1)
    real_Bn = torch.cat([real_BP, labels_BM > 0], dim=1)
    best_Bn, object_Bn = overlaps(boxes_Bn4, objects_BM4, labels_BM).max(dim=1)
    foreground_Bn = (best_Bn >= high) & real_Bn
    object_keys_BM = -1 - torch.arange(labels_BM.shape[1], device=labels_BM.device).expand_as(labels_BM)
    draw_Bn = draws(seeds_B + 1, torch.cat([anchors_BP, object_keys_BM], dim=1))
    most = int(budget * fraction)
    chosen_Bn = sample(foreground_Bn, draw_Bn, torch.full_like(seeds_B, most), most)
    priority_Bn = (draw_Bn + chosen_Bn).masked_fill(~real_Bn | (foreground_Bn & ~chosen_Bn), -1.0)
    priority_BR, index_BR = priority_Bn.topk(budget, dim=1)
    object_BR = object_Bn.gather(1, index_BR)
    labels_BR = labels_BM.gather(1, object_BR) * (priority_BR >= 1)
    regions_BR4 = boxes_Bn4.gather(1, index_BR[..., None].expand(-1, -1, 4))
    return regions_BR4, labels_BR.masked_fill(priority_BR < 0, -1), object_BR


def draws(seeds_B: Tensor, keys_n: Tensor) -> Tensor:
    """Uniform draws in [0, 1) [B, n], a function of each image's seed and of keys [n] or [B, n] int64 alone: the same
    on any device, for any number of ranks, and after a resume. A counter-based generator: multiplication and xor-shift,
    as in SplitMix64 (Steele et al. 2014) but on 31-bit halves, whose products fit into 63 bits."""
    counter_Bn = seeds_B[:, None] + keys_n * 0x61C88647
    for multiplier in (0x7FEB352D, 0x5A2B3C1D, 0x2C1B3C6D):
        counter_Bn = counter_Bn & 0x7FFFFFFF
        counter_Bn = (counter_Bn ^ (counter_Bn >> 15)) * multiplier
    counter_Bn = counter_Bn ^ (counter_Bn >> 16)
    return (counter_Bn & 0xFFFFFF).float() / 2**24


# ------------------------------------------------------------------------------------------- features and detections


def region_features(
    pool: MultiScaleRoIAlign, features: Mapping[str, Tensor], boxes_BR4: Tensor, image_size: tuple[int, int]
) -> Tensor:
    """Features [B * R, channels, side, side] of regions, each from the level of the pyramid that fits its size."""
    return pool(features, list(boxes_BR4), [image_size] * len(boxes_BR4))


def detections(
    scores_BPK: Tensor, boxes_BPK4: Tensor, real_BP: Tensor, count: int, least: float, iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The final detections: of the boxes that score at least `least`, thinned out class by class, an image's best
    `count`. Returns boxes [B, D, 4], scores [B, D] (0 fills up) and labels [B, D] int64.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for scores_PK, boxes_PK4, real_P in zip(scores_BPK, boxes_BPK4, real_BP, strict=True):
        candidates = (
            (scores_PK >= least) & real_P[:, None] & (boxes_PK4[..., 2:] - boxes_PK4[..., :2] > MIN_SIDE).all(-1)
        )
        candidates[:, 0] = False  # the background
        region, label = candidates.nonzero(as_tuple=True)
        boxes, scores = boxes_PK4[region, label], scores_PK[region, label]
        kept = ops.batched_nms(boxes, scores, label, iou)[:count]
        found.append((boxes[kept], scores[kept], label[kept]))
    boxes, scores, labels = zip(*found, strict=True)
    return fill_up(list(boxes), count), fill_up(list(scores), count), fill_up(list(labels), count)
