"""Small files that are read and written whole, and their sums."""

import hashlib
import json
from pathlib import Path
from typing import Any

__all__ = ["read_json", "sha256", "write_json"]


def write_json(path: Path, tree: Any) -> None:
    """Replaces the file in one step, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(tree, indent=2, default=str) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What the file holds; {} where it does not exist or holds no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def sha256(path: Path) -> str:
    """SHA-256 of the file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
