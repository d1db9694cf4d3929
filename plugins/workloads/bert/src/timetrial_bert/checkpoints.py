"""Initial weights from a file."""

from __future__ import annotations

from typing import Any

from core.errors import UsageError


def load(network: Any, source: str) -> None:
    raise UsageError(f"workload.init_checkpoint={source} is not available yet")


def tf_names(network: Any) -> list[tuple[str, str]]:
    return []
