"""A prepared COCO folder (see prepare.py) as examples: images decoded, resized and flipped by threads, ahead of use."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from core.api.data import EpochSampler
from core.api.errors import DataError
from timetrial_maskrcnn.batch import Example

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Red, green, blue, of 1: what torchvision's ImageNet weights were trained with."""
IMAGES = {"train": 117_266, "eval": 5_000}
"""Of COCO 2017, once cleaned: what a synthetic run takes the set to be."""
CLASSES = 80


class Coco:
    """The images of one part ("train" or "eval") under `root`.

    The shorter side becomes `min_size` pixels, unless the longer one would exceed `max_size`. Training images are
    mirrored by a draw from their seed where `flip` is set.
    """

    channels, objects = 3, None

    def __init__(self, root: Path | None, part: str, split: str, min_size: int, max_size: int, flip: bool) -> None:
        self.root, self.part, self.split = root, part, split
        self.min_size, self.max_size, self.flip = min_size, max_size, flip

    def __len__(self) -> int:
        return len(self._truth["images"]) if self.root else IMAGES[self.part]

    @property
    def classes(self) -> int:
        return len(self.categories) if self.root else CLASSES

    @cached_property
    def categories(self) -> tuple[dict[str, Any], ...]:
        """In order of the model's labels 1, 2, ..."""
        return tuple(sorted(self._truth["categories"], key=lambda category: category["id"]))

    def annotations(self) -> dict[str, Any]:
        """Ground truth in COCO's instances format."""
        return self._truth

    @cached_property
    def _truth(self) -> dict[str, Any]:
        assert self.root is not None
        return json.loads((self.root / f"{self.part}.json").read_text())

    @cached_property
    def _by_image(self) -> dict[int, list[dict[str, Any]]]:
        found: dict[int, list[dict[str, Any]]] = {}
        for annotation in self._truth["annotations"]:
            found.setdefault(annotation["image_id"], []).append(annotation)
        return found

    @cached_property
    def wide(self) -> NDArray[np.bool_]:
        """Which images are wider than high."""
        return np.array([image["width"] > image["height"] for image in self._truth["images"]])

    def example(self, index: int, seed: int | None = None) -> Example:
        """Image number `index`; with a seed as a training example, objects and all."""
        entry = self._truth["images"][index]
        pixels, scale = self._pixels(entry)
        height, width = pixels.shape[:2]
        objects = [] if seed is None else self._by_image.get(entry["id"], [])
        labels = {category["id"]: label for label, category in enumerate(self.categories, 1)}
        boxes = np.array([o["bbox"] for o in objects], np.float32).reshape(-1, 4) * np.float32([*scale, *scale])
        boxes[:, 2:] += boxes[:, :2]
        boxes = np.clip(boxes, 0, np.float32([width, height, width, height]))
        masks = np.zeros((len(objects), height, width), np.uint8)
        for mask, o in zip(masks, objects, strict=True):
            mask[:] = _rasterise(o["segmentation"], scale, height, width)
        if seed is not None and self.flip and seed % 2:
            pixels, masks = pixels[:, ::-1], masks[:, :, ::-1]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        normal = (pixels / np.float32(255) - np.float32(MEAN)) / np.float32(DEVIATION)
        return Example(
            image_CHW=torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1))),
            boxes_M4=torch.from_numpy(boxes),
            labels_M=torch.tensor([labels[o["category_id"]] for o in objects], dtype=torch.int64),
            masks_MHW=torch.from_numpy(np.ascontiguousarray(masks)),
            id=entry["id"],
            original=(entry["height"], entry["width"]),
            seed=seed or 0,
        )

    def _pixels(self, entry: dict[str, Any]) -> tuple[NDArray[np.uint8], tuple[float, float]]:
        """The resized image [H, W, 3], and by how much its width and its height were scaled."""
        assert self.root is not None
        path = self.root / "images" / self.split / entry["file_name"]
        try:
            content = path.read_bytes()
        except OSError as error:
            remedy = f"let {path.parent} link to the folder of the images"
            raise DataError(f"{path}: {error.strerror}: {remedy}") from None
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise DataError(f"{path} has changed since it was prepared (its SHA-256 differs): prepare the folder again")
        with Image.open(io.BytesIO(content)) as image:
            width, height = resized(image.width, image.height, self.min_size, self.max_size)
            scale = width / image.width, height / image.height
            return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)), scale


def resized(width: int, height: int, least: int, most: int) -> tuple[int, int]:
    """The size at which the shorter side is `least` pixels, or fewer where the longer one would exceed `most`.

    Rounded as by the reference (maskrcnn_benchmark, `Resize.get_size`).
    """
    short, long = min(width, height), max(width, height)
    side = round(most * short / long) if long / short * least > most else least
    if short == side:
        return width, height
    other = side * long // short
    return (side, other) if width < height else (other, side)


def _rasterise(shape: Any, scale: tuple[float, float], height: int, width: int) -> NDArray[np.uint8]:
    """A COCO segmentation as a mask [height, width] of the resized image."""
    if isinstance(shape, dict):
        whole = rle.frPyObjects(shape, *shape["size"]) if isinstance(shape["counts"], list) else shape
        image = Image.fromarray(rle.decode(whole)).resize((width, height), Image.Resampling.NEAREST)
        return np.asarray(image)
    polygons = [(np.array(p).reshape(-1, 2) * scale).ravel().tolist() for p in shape]
    return rle.decode(rle.merge(rle.frPyObjects(polygons, height, width)))


@dataclass(frozen=True, kw_only=True)
class GroupedSampler(EpochSampler):
    """Batches of images that are all wide or all high, so that little of a batch is padding; what remains of both
    groups at an epoch's end comes together. Every image comes once an epoch."""

    wide: NDArray[np.bool_]

    def order(self, seed: int) -> NDArray[np.int64]:
        shuffled = super().order(seed)
        groups = [shuffled[self.wide[shuffled] == wide] for wide in (True, False)]
        whole = [len(group) // self.global_batch * self.global_batch for group in groups]
        batches = np.concatenate([g[:n] for g, n in zip(groups, whole, strict=True)]).reshape(-1, self.global_batch)
        shuffled_batches = np.random.default_rng(seed + 1).permutation(batches)
        return np.concatenate([shuffled_batches.ravel(), *(g[n:] for g, n in zip(groups, whole, strict=True))])
