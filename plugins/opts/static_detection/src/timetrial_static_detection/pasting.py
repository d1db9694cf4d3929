"""Masks of detections as run-length encoded masks of their image, from each box's part of it alone.

Letters: D detections of an image, s the side of a predicted mask, h x w a box's part of the image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import Tensor

Array = NDArray[Any]


def masks(masks_Dss: Tensor, boxes_D4: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    """Each mask sampled bilinearly at the centres of its box's pixels, 1 from 0.5 on.

    Bilinear sampling of a box is a product of three matrices, one for the rows and one for the columns: in float64, so
    that only a value within the baseline's own rounding (float32) of 0.5 can fall on its other side.
    """
    runs = list[dict[str, Any]]()
    for mask_ss, (x1, y1, x2, y2) in zip(masks_Dss.double().numpy(), boxes_D4.tolist(), strict=True):
        left, top = max(0, int(x1)), max(0, int(y1))
        right, bottom = max(left, min(width, int(x2) + 1)), max(top, min(height, int(y2) + 1))
        across_ws = _weights(left, right, x1, x2, mask_ss.shape[1])
        down_hs = _weights(top, bottom, y1, y2, mask_ss.shape[0])
        inside_wh = across_ws @ mask_ss.T @ down_hs.T >= 0.5
        runs.append({"size": [height, width], "counts": run_lengths(inside_wh, left, top, height, width)})
    encoded = rle.frPyObjects(runs, height, width) if runs else []
    return [{"size": e["size"], "counts": e["counts"].decode()} for e in encoded]


def _weights(start: int, stop: int, low: float, high: float, side: int) -> Array:
    """How much each of a mask's `side` cells from `low` to `high` has of the value at the centre of each pixel."""
    place_n = (np.arange(start, stop) + 0.5 - low) / (high - low) * side - 0.5
    return np.maximum(0, 1 - np.abs(place_n[:, None] - np.arange(side)))


def run_lengths(inside_wh: Array, left: int, top: int, height: int, width: int) -> list[int]:
    """COCO's uncompressed run-length encoding of an image [height, width] that is 0 but for this part of it, whose
    upper left pixel is (left, top): lengths of runs of 0 and 1, column by column."""
    columns, rows = inside_wh.shape
    edged = np.zeros((columns, rows + 2), dtype=bool)
    edged[:, 1:-1] = inside_wh
    column_n, row_n = np.divmod(np.flatnonzero(edged[:, 1:] != edged[:, :-1]), rows + 1)
    turns_n = (left + column_n) * height + top + row_n  # where a run of ones begins, or ends
    joined = np.flatnonzero(turns_n[1:-1:2] == turns_n[2::2])  # at a column's end, where the next one goes on
    turns_n = np.delete(turns_n, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    lengths = np.diff(turns_n, prepend=0, append=height * width).tolist()
    return lengths if lengths[-1] else lengths[:-1]
