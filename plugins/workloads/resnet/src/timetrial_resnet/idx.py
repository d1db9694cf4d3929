"""Reader of IDX files, as MNIST, Fashion-MNIST and EMNIST come (Y. LeCun, "The MNIST database", "file formats").

An IDX file is two zero bytes, a type (8: unsigned bytes), the number of dimensions, each dimension as a big-endian
32-bit integer, and the values. It may be compressed with gzip.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.api.errors import DataError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its four files."""

PREFIXES = {"train": "train", "val": "t10k"}
KINDS = {"images": "idx3-ubyte", "labels": "idx1-ubyte"}

REMEDY = "give the files as published, such as those of Debian's package dataset-fashion-mnist"


def find(root: Path, split: str, kind: str) -> Path:
    """The file of "train" or "val" that holds "images" or "labels". EMNIST puts its own name before the usual one."""
    if not root.is_dir():
        raise DataError(
            f"folder {root} does not exist: set data.root to a folder of IDX files "
            "(on Debian, `apt-get install dataset-fashion-mnist` provides Fashion-MNIST)"
        )
    words = (PREFIXES[split], "test") if split == "val" else (PREFIXES[split],)
    for word in words:
        for ending in (KINDS[kind], KINDS[kind] + ".gz"):
            found = sorted(root.glob(f"*{word}-{kind}-{ending}"))
            if len(found) > 1:
                raise DataError(f"{root} holds several data sets ({found[0].name}, {found[1].name}): keep one of them")
            if found:
                return found[0]
    raise DataError(f"{root} has no {PREFIXES[split]}-{kind}-{KINDS[kind]} (nor with .gz): {REMEDY}")


def shape(path: Path) -> tuple[int, ...]:
    """The dimensions, after checking that the file's size agrees with them; reads no values.

    The last four bytes of a compressed file hold the size of its contents, modulo 2^32 (RFC 1952, section 2.3.1).
    """
    try:
        with _open(path) as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\x00\x00\x08":
                raise DataError(f"{path} is not an IDX file of unsigned bytes: {REMEDY}")
            dimensions = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
    except (OSError, EOFError, struct.error, zlib.error):
        raise DataError(f"{path} is damaged: {REMEDY}") from None
    expected = 4 + 4 * len(dimensions) + math.prod(dimensions)
    if path.suffix == ".gz":
        actual = struct.unpack("<I", path.read_bytes()[-4:])[0]
        expected %= 2**32
    else:
        actual = path.stat().st_size
    if actual != expected:
        raise DataError(
            f"{path} is truncated or damaged: its header says {expected} bytes, but it has {actual}: {REMEDY}"
        )
    return dimensions


def read(path: Path) -> NDArray[np.uint8]:
    """The values, in the shape that the header gives."""
    dimensions = shape(path)
    try:
        with _open(path) as file:
            file.seek(4 + 4 * len(dimensions))
            return np.frombuffer(bytearray(file.read()), np.uint8).reshape(dimensions)
    except (OSError, EOFError, zlib.error, ValueError):
        raise DataError(f"{path} is truncated or damaged: {REMEDY}") from None


def _open(path: Path) -> gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]
