"""From a JPEG file to the square that the model sees: decoded at a reduced scale where that suffices, resized once.

It follows the MLPerf reference (mlcommons/training, image_classification/tensorflow2/imagenet_preprocessing.py) but for
two things: Pillow's bilinear filter averages when it makes an image smaller, TensorFlow's samples; and a large JPEG is
decoded at 1/2, 1/4 or 1/8 of its size where the crop stays at least as large as the square.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

AREA_RANGE = (0.05, 1.0)
ASPECT_RANGE = (0.75, 1.33)
MAX_ATTEMPTS = 100
"""Reference: `_decode_crop_and_flip`, as are the two ranges."""

MIN_OBJECT_COVERED = 0.1
"""Reference: likewise. Where no bounding box is annotated, and a folder has none, the object is the whole image: a crop
must cover a tenth of it."""

EVAL_RESIZE = 256 / 224
"""The shorter side before the central crop, relative to the crop (reference: _RESIZE_MIN)."""

Box = tuple[float, float, float, float]


def random_crop(path: str, size: int, flip: bool, rng: np.random.Generator) -> Image.Image:
    """A random part of the image as size x size pixels, mirrored every second time if `flip`."""
    with Image.open(path) as image:
        crop = _resized(image, random_box(*image.size, rng), size)
    mirrored = rng.random() < 0.5
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and mirrored else crop


def central_crop(path: str, size: int) -> Image.Image:
    """The middle of the image as size x size pixels: what is left when its shorter side is made EVAL_RESIZE x size
    pixels and the rest cut off evenly."""
    with Image.open(path) as image:
        width, height = image.size
        side = min(width, height) / EVAL_RESIZE
        left, top = (width - side) / 2, (height - side) / 2
        return _resized(image, (left, top, left + side, top + side), size)


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """left, top, right, bottom of a random part, drawn as tf.image.sample_distorted_bounding_box does: the aspect ratio
    uniformly, then the height uniformly among those whose area is in range. The whole image if no attempt fits."""
    for _ in range(MAX_ATTEMPTS):
        aspect = rng.uniform(*ASPECT_RANGE)
        low, high = (round(math.sqrt(area * width * height / aspect)) for area in AREA_RANGE)
        high = min(high, height, int((width + 0.5) / aspect))
        crop_height = int(rng.integers(min(low, high), high, endpoint=True))
        crop_width = min(round(crop_height * aspect), width)
        covered = crop_width * crop_height / (width * height)
        if covered >= max(AREA_RANGE[0], MIN_OBJECT_COVERED):
            left = int(rng.integers(0, width - crop_width, endpoint=True))
            top = int(rng.integers(0, height - crop_height, endpoint=True))
            return left, top, left + crop_width, top + crop_height
    return 0, 0, width, height


def _resized(image: Image.Image, box: Box, size: int) -> Image.Image:
    width, height = image.size
    shrink = min(box[2] - box[0], box[3] - box[1]) / size
    if shrink > 1:
        image.draft("RGB", (math.ceil(width / shrink), math.ceil(height / shrink)))
    x, y = image.size[0] / width, image.size[1] / height
    return image.convert("RGB").resize(
        (size, size), Image.Resampling.BILINEAR, (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    )
