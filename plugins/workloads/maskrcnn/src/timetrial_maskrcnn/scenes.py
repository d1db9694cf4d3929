"""The embedded data set: scenes of handwritten digits with exact masks, which anyone can make again.

A scene is a square grey image with one to three digits of different sizes that do not touch. The set is the same for
every seed of a run; scenes to be evaluated are made of digits that no training scene shows.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from timetrial_maskrcnn import digits
from timetrial_maskrcnn.batch import Example

SIDE = 96
MOST = 3
CLASSES = 10
SCALES = (0.8, 1.6)
"""Of a digit of 28 pixels."""
INK = 96
"""A pixel at least so dark (of 255) belongs to the digit."""
GAP = 2
"""Pixels between the boxes of two digits."""
TRIES = 20
"""Places tried for a digit before it is left out."""
NOISE = 24
"""Largest grey level of the background's noise."""
MEAN, DEVIATION = 25.0, 50.0
"""Roughly, of all pixels of all training scenes (grey levels)."""
SET_SEED = 20170320
"""Of the set itself (the date of the paper); a run's seed does not change its data."""


class Scenes:
    """`count` scenes of the training or of the evaluation set, drawn when first asked for."""

    channels, classes, objects = 1, CLASSES, MOST
    categories = tuple({"id": d + 1, "name": str(d)} for d in range(CLASSES))

    def __init__(self, count: int, held_out: bool) -> None:
        self.count, self.held_out = count, held_out

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _drawn(self) -> list[tuple[NDArray[np.uint8], list[tuple[int, NDArray[np.bool_]]]]]:
        glyphs, names = digits.read(digits.find(), self.held_out)
        generator = np.random.default_rng([SET_SEED, int(self.held_out)])
        return [_draw(generator, glyphs, names) for _ in range(self.count)]

    def example(self, index: int, seed: int = 0) -> Example:
        """Scene number `index`, with the seed of its random draws."""
        image, objects = self._drawn[index]
        masks = np.stack([mask for _, mask in objects])
        boxes = torch.tensor([_box(mask) for mask in masks], dtype=torch.float32)
        return Example(
            image_CHW=(torch.from_numpy(image).float()[None] - MEAN) / DEVIATION,
            boxes_M4=boxes,
            labels_M=torch.tensor([name + 1 for name, _ in objects]),
            masks_MHW=torch.from_numpy(masks),
            id=index + 1,
            original=(SIDE, SIDE),
            seed=seed,
        )

    def annotations(self) -> dict[str, Any]:
        """The set's ground truth as COCO's instances JSON, its masks as compressed RLE."""
        images = [
            {"id": i + 1, "height": SIDE, "width": SIDE, "file_name": f"{i + 1:06}.png"} for i in range(self.count)
        ]
        found: list[dict[str, Any]] = []
        for number, (_, objects) in enumerate(self._drawn, 1):
            for name, mask in objects:
                encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
                x1, y1, x2, y2 = _box(mask)
                found.append({
                    "id": len(found) + 1, "image_id": number, "category_id": name + 1, "iscrowd": 0,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()),
                    "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                })  # fmt: skip
        return {"info": {}, "images": images, "annotations": found, "categories": list(self.categories)}


def _draw(
    generator: np.random.Generator, glyphs: NDArray[np.uint8], names: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], list[tuple[int, NDArray[np.bool_]]]]:
    """One scene: its image [96, 96] and, for each digit, its name and mask [96, 96]."""
    image = generator.integers(0, NOISE, (SIDE, SIDE), dtype=np.uint8, endpoint=True)
    taken = np.zeros((SIDE, SIDE), dtype=bool)
    objects: list[tuple[int, NDArray[np.bool_]]] = []
    wanted = int(generator.integers(1, MOST, endpoint=True))
    for _ in range(wanted * TRIES):
        which, side = generator.integers(len(glyphs)), int(digits.SIZE * generator.uniform(*SCALES))
        top, left = generator.integers(0, SIDE - side, 2, endpoint=True)
        glyph = np.asarray(Image.fromarray(glyphs[which]).resize((side, side), Image.Resampling.BILINEAR))
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        mask[top : top + side, left : left + side] = glyph >= INK
        x1, y1, x2, y2 = _box(mask)
        around = (slice(max(0, y1 - GAP), y2 + GAP), slice(max(0, x1 - GAP), x2 + GAP))
        if taken[around].any():
            continue
        taken[y1:y2, x1:x2] = True
        part = image[top : top + side, left : left + side]
        np.maximum(part, glyph, out=part)
        objects.append((int(names[which]), mask))
        if len(objects) == wanted:
            break
    return image, objects


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The tight box (x1, y1, x2, y2), its last row and column excluded."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
