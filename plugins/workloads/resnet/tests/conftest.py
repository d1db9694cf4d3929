"""What the tests of this plugin share: a workload built from its real YAML, without a run around it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from core.testing.contexts import lone_workload
from timetrial_resnet.workload import ResNetWorkload

REPO = Path(__file__).parents[4]

MakeWorkload = Callable[..., ResNetWorkload]


@pytest.fixture
def make(tmp_path: Path) -> MakeWorkload:
    """`(option, *overrides, rank, world, seed, **data)` to the workload: see `lone_workload`."""
    return functools.partial(lone_workload, tmp_path)


@pytest.fixture
def real_images() -> Path:
    """The shared sample in ImageFolder layout."""
    folder = Path(os.environ.get("TIMETRIAL_REALDATA", REPO.parent / "shared" / "data")) / "imagefolder"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set TIMETRIAL_REALDATA")
    return folder
