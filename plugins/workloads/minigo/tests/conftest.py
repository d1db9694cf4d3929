"""What the tests of this plugin share: a workload built from its real YAML, without a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.testing.contexts import lone_workload
from timetrial_minigo.workload import MiniGoWorkload


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., MiniGoWorkload]:
    """`(option, *overrides, rank, world, seed)` to the workload, its model built and in place."""

    def make_workload(name: str, *overrides: str, **place: Any) -> MiniGoWorkload:
        workload = lone_workload(tmp_path, name, *overrides, **place)
        ctx = workload.ctx
        ctx.model = workload.build_model()
        ctx.infer = lambda data: workload.infer(ctx.model, data)
        return workload

    return make_workload
