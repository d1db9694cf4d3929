"""What a batch is made of, whichever data set it comes from.

`Batch.data` is a dictionary of tensors; B images, M the most objects of an image in the batch:

    images  [B, C, H, W] float32    normalised, zeros beside and below an image smaller than the batch
    sizes   [B, 2] int64            height and width of the image itself
    boxes   [B, M, 4] float32       x1, y1, x2, y2 in pixels; zeros fill up
    labels  [B, M] int64            from 1; 0 fills up
    masks   [B, M, H, W] uint8      0 or 1
    seeds   [B] int64               for the random draws that belong to this image in this epoch
    ids     [B] int64               the image's id in the annotations
    originals [B, 2] int64          height and width before resizing, to which detections are scaled back

Training reads the first six, inference images, sizes, ids and originals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One image with its objects; an image to be evaluated has none."""

    image_CHW: Tensor
    boxes_M4: Tensor
    labels_M: Tensor
    masks_MHW: Tensor
    id: int
    original: tuple[int, int]
    seed: int = 0


def collate(examples: Sequence[Example], objects: int | None = None, multiple: int = 1) -> dict[str, Tensor]:
    """The examples as one batch, filled up to the largest, and to sides that `multiple` divides; `objects` sets M."""
    sides = [max(e.image_CHW.shape[axis] for e in examples) for axis in (1, 2)]
    height, width = (-(-side // multiple) * multiple for side in sides)
    most = objects if objects is not None else max(1, *(len(e.labels_M) for e in examples))
    count, channels = len(examples), examples[0].image_CHW.shape[0]
    images = torch.zeros(count, channels, height, width)
    boxes, labels = torch.zeros(count, most, 4), torch.zeros(count, most, dtype=torch.int64)
    masks = torch.zeros(count, most, height, width, dtype=torch.uint8)
    for i, e in enumerate(examples):
        _, h, w = e.image_CHW.shape
        m = len(e.labels_M)
        images[i, :, :h, :w] = e.image_CHW
        boxes[i, :m], labels[i, :m] = e.boxes_M4, e.labels_M
        masks[i, :m, :h, :w] = e.masks_MHW
    return {
        "images": images,
        "sizes": torch.tensor([e.image_CHW.shape[1:] for e in examples]),
        "boxes": boxes,
        "labels": labels,
        "masks": masks,
        "seeds": torch.tensor([e.seed for e in examples]),
        "ids": torch.tensor([e.id for e in examples]),
        "originals": torch.tensor([e.original for e in examples]),
    }
