"""COCO's average precision, from detections of all ranks, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.nn import functional as F

from core.api.mesh import Mesh

METRICS = {"bbox": "box_ap", "segm": "mask_ap"}

Masks = Callable[[Tensor, Tensor, int, int], list[dict[str, Any]]]
"""As `masks`."""


def records(
    outputs: dict[str, Tensor], data: dict[str, Tensor], categories: list[int], masks: Masks
) -> list[dict[str, Any]]:
    """A batch of detections in COCO's results format, boxes and masks scaled back to the original images.

    `categories` are the annotations' ids of the model's labels 1, 2, ...
    """
    on_host = {name: tensor.cpu() for name, tensor in outputs.items()}
    ids, sizes, originals = (data[name].tolist() for name in ("ids", "sizes", "originals"))
    found: list[dict[str, Any]] = []
    for i, (number, size, original) in enumerate(zip(ids, sizes, originals, strict=True)):
        height, width = original
        scale = torch.tensor([width / size[1], height / size[0]]).repeat(2)
        count = int((on_host["scores"][i] > 0).sum())  # the best come first; the rest fills up
        boxes_D4, scores, labels, masks_Dss = (on_host[n][i, :count] for n in ("boxes", "scores", "labels", "masks"))
        shapes = masks(masks_Dss, boxes_D4 * scale, height, width)
        rows = zip((boxes_D4 * scale).tolist(), scores.tolist(), labels.tolist(), shapes, strict=True)
        for (x1, y1, x2, y2), score, label, shape in rows:
            found.append({
                "image_id": number, "category_id": categories[label - 1], "score": score,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": shape,
            })  # fmt: skip
    return found


def masks(masks_Dss: Tensor, boxes_D4: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    """The default at the seam MASKS: mask probabilities of D boxes of one image, on the host, as run-length encoded
    masks of that image, in the form in which COCO's JSON has them."""
    encoded = (
        rle.encode(np.asfortranarray(paste(mask_ss, tuple(box), height, width)))
        for mask_ss, box in zip(masks_Dss, boxes_D4.tolist(), strict=True)
    )
    return [{"size": e["size"], "counts": e["counts"].decode()} for e in encoded]


def paste(mask_ss: Tensor, box: tuple[float, float, float, float], height: int, width: int) -> NDArray[np.uint8]:
    """Mask probabilities of a box as a binary mask [height, width] of the image, sampled bilinearly at each pixel's
    centre; 1 from a probability of 0.5 on."""
    x1, y1, x2, y2 = box
    left, top = max(0, int(x1)), max(0, int(y1))
    right, bottom = min(width, int(x2) + 1), min(height, int(y2) + 1)
    whole = np.zeros((height, width), dtype=np.uint8)
    if right > left and bottom > top:
        across = (torch.arange(left, right) + 0.5 - x1) / (x2 - x1) * 2 - 1
        down = (torch.arange(top, bottom) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid_hw2 = torch.stack(torch.meshgrid(down, across, indexing="ij")[::-1], dim=-1)
        sampled = F.grid_sample(mask_ss[None, None], grid_hw2[None], align_corners=False)[0, 0]
        whole[top:bottom, left:right] = (sampled >= 0.5).numpy()
    return whole


def average_precision(annotations: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, float]:
    """Box and mask AP, averaged over IoU from 0.50 to 0.95; 0 where nothing was detected."""
    quality: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        truth = COCO()
        truth.dataset = annotations
        truth.createIndex()
        for kind, metric in METRICS.items():
            if not found:
                quality[metric] = 0.0
                continue
            evaluation = COCOeval(truth, truth.loadRes([dict(record) for record in found]), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            quality[metric] = float(evaluation.stats[0])
    return quality


def gathered(mine: list[dict[str, Any]], mesh: Mesh) -> list[dict[str, Any]]:
    """The detections of all data ranks, in order of image: the same on every rank, whatever their number."""
    if mesh.world_size > 1:
        lists: list[list[dict[str, Any]]] = [[] for _ in range(mesh.world_size)]
        torch.distributed.all_gather_object(lists, mine)
        mine = [record for rank in mesh.speakers for record in lists[rank]]
    return sorted(mine, key=lambda record: record["image_id"])  # stable: an image's own order stays


def write(folder: Path, annotations: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """annotations.json and detections.json: what pycocotools needs to compute the reported figures again."""
    folder.mkdir(exist_ok=True)
    if not (folder / "annotations.json").exists():
        (folder / "annotations.json").write_text(json.dumps(annotations))
    partial = folder / ".detections.json.partial"
    partial.write_text(json.dumps(found))
    partial.replace(folder / "detections.json")
