"""`python -m core.prepare workload=maskrcnn_mlperf source=COCO out=FOLDER`: a COCO folder, checked and cleaned.

    COCO/train2017/*.jpg   COCO/val2017/*.jpg   COCO/annotations/instances_{train,val}2017.json

    FOLDER/train.json  FOLDER/eval.json     COCO's instances format; each image with its SHA-256
    FOLDER/images/train2017 -> COCO/train2017  (a link: images are not copied; point it elsewhere if they move)

What the reference leaves out of training is left out and counted: crowd regions, objects without area or outside their
image, and images without objects. What is wrong (a missing or unreadable image, an annotation of no image or category,
a malformed polygon) is named, and more than `data.max_bad` of them are refused. Evaluation keeps every image.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.api.errors import DataError

if TYPE_CHECKING:
    from core.api.preparation import Preparation
    from timetrial_maskrcnn.config import MaskRCNNConfig

CHUNK = 500
"""Images a job."""
LEAST_SIDE = 1.0
"""Pixels: an object with a narrower box is left out (the reference's `has_valid_annotation`)."""
LAYOUT = "source must be a folder with {split}/*.jpg and annotations/instances_{split}.json, as COCO 2017 has it"


def prepare(preparation: Preparation, config: MaskRCNNConfig) -> dict[str, int]:
    """The hook's work. Returns counts."""
    counts: dict[str, int] = {}
    for part, split in (("train", config.train_split), ("eval", config.eval_split)):
        annotations = _read(preparation.source, split)
        sums = _check_images(preparation, split, annotations["images"])
        annotations["images"] = [
            {**image, "sha256": sums[image["id"]]} for image in annotations["images"] if image["id"] in sums
        ]
        cleaned, left_out = _clean(preparation, split, annotations, training=part == "train")
        preparation.map(f"{split} annotations", write_json, [(f"{part}.json", (cleaned,))])
        counts |= {f"{part} images": len(cleaned["images"]), f"{part} objects": len(cleaned["annotations"])}
        counts |= {f"{part} {reason} left out": number for reason, number in sorted(left_out.items())}
        if not cleaned["images"]:
            raise DataError(f"{split} has no image to use: {LAYOUT.format(split=split)}")
        link = preparation.out / "images" / split
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((preparation.source / split).absolute(), target_is_directory=True)
    return counts


def _read(source: Path, split: str) -> dict[str, Any]:
    path = source / "annotations" / f"instances_{split}.json"
    try:
        whole = json.loads(path.read_text())
        return {key: list(whole[key]) for key in ("images", "annotations", "categories")}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: {LAYOUT.format(split=split)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a COCO instances file ({type(error).__name__}: {error})") from None


# ------------------------------------------------------------------------------------------------------------- images


def _check_images(preparation: Preparation, split: str, images: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Image id -> SHA-256 of each image that can be used."""
    folder, sums = preparation.source / split, dict[int, str]()
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    jobs = [
        (f"checked/{split}-{number:05d}", (folder, [(i["file_name"], i["width"], i["height"]) for i in chunk]))
        for number, chunk in enumerate(chunks)
    ]
    notes = preparation.map(f"{split} images", check_chunk, jobs)
    for chunk, note in zip(chunks, notes, strict=True):
        for image, (digest, problem) in zip(chunk, note, strict=True):
            if problem:
                preparation.refuse(f"{split}/{image['file_name']}", problem)
            else:
                sums[image["id"]] = digest
    for name, _ in jobs:  # what they found is in the notes
        del preparation.files[name]
    shutil.rmtree(preparation.out / "checked", ignore_errors=True)
    return sums


def check_chunk(path: Path, folder: Path, images: Sequence[tuple[str, int, int]]) -> list[tuple[str, str]]:
    """Job: SHA-256 and what is wrong ("" for nothing) of each image (file name, width, height)."""
    found = [_check(folder / name, width, height) for name, width, height in images]
    path.touch()
    return found


def _check(path: Path, width: int, height: int) -> tuple[str, str]:
    from PIL import Image

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            size = image.size
    except FileNotFoundError:
        return "", "the image is missing"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return "", f"the image is unreadable: {error}"
    problem = "" if size == (width, height) else f"the image is {size[0]} x {size[1]}, not {width} x {height}"
    return hashlib.sha256(content).hexdigest(), problem


# -------------------------------------------------------------------------------------------------------- annotations


def _clean(
    preparation: Preparation, split: str, annotations: dict[str, Any], training: bool
) -> tuple[dict[str, Any], Counter[str]]:
    """The annotations that are used, and how many of what were left out."""
    images = {image["id"]: image for image in annotations["images"]}
    categories = {category["id"] for category in annotations["categories"]}
    known = {image for image in preparation.bad if image.startswith(f"{split}/")}
    kept, left_out = list[dict[str, Any]](), Counter[str]()
    for annotation in annotations["annotations"]:
        problem = _problem(annotation, categories, images.get(annotation.get("image_id")))
        if annotation.get("image_id") not in images and not problem:
            if known:  # its image was refused, and named, above
                left_out["objects of refused images"] += 1
                continue
            problem = f"it belongs to image {annotation.get('image_id')}, which does not exist"
        if problem:
            preparation.refuse(f"{split} annotation {annotation.get('id')}", problem)
        elif training and annotation.get("iscrowd"):
            left_out["crowd regions"] += 1
        elif training and (reason := _unusable(annotation, images[annotation["image_id"]])):
            left_out[reason] += 1
        else:
            kept.append(annotation)
    if training:
        used = {annotation["image_id"] for annotation in kept}
        left_out["images without objects"] = len(images) - len(used)
        images = {number: image for number, image in images.items() if number in used}
    return {"images": list(images.values()), "annotations": kept, "categories": annotations["categories"]}, left_out


def _problem(annotation: dict[str, Any], categories: set[int], image: dict[str, Any] | None) -> str:
    """What is wrong with the annotation as such, or nothing. `image` is its image, where that exists."""
    box, shape = annotation.get("bbox"), annotation.get("segmentation")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_finite, box))):
        return f"its bbox is {box}, four finite numbers are expected"
    if annotation.get("category_id") not in categories:
        return f"its category {annotation.get('category_id')} does not exist"
    if isinstance(shape, dict):
        if not {"counts", "size"} <= shape.keys():
            return "its mask has no counts and size"
        wanted = [image["height"], image["width"]] if image else shape["size"]
        return "" if shape["size"] == wanted else f"its mask has the size {shape['size']}, its image {wanted}"
    if not isinstance(shape, list) or not shape:
        return "it has no segmentation"
    for polygon in shape:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(_finite, polygon)):
            return "a polygon is not a list of three or more points"
    return ""


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _unusable(annotation: dict[str, Any], image: dict[str, Any]) -> str:
    """Why the reference does not train on this object, if it does not."""
    x, y, width, height = annotation["bbox"]
    if width <= LEAST_SIDE or height <= LEAST_SIDE:
        return "objects without area"
    spans = [(x, y, x + width, y + height)]
    shape = annotation["segmentation"]
    if isinstance(shape, list):
        across, down = ([value for polygon in shape for value in polygon[axis::2]] for axis in (0, 1))
        spans.append((min(across), min(down), max(across), max(down)))
    inside = all(
        left < image["width"] and top < image["height"] and right > 0 and bottom > 0
        for left, top, right, bottom in spans
    )
    return "" if inside else "objects outside their image"


def write_json(path: Path, tree: Any) -> None:
    """Job: one file of annotations."""
    path.write_text(json.dumps(tree, sort_keys=True))
