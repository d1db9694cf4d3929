"""What all tests of the plugin share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may not be deterministic, and says so


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """As core runs training: an operation that may give other bits the next time is an error."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")
