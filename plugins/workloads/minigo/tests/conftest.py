"""What the tests of this plugin share: a workload built from its real YAML, without a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import timetrial_minigo
from core.api.config import validate
from core.api.mesh import Mesh, arrange
from core.api.types import RunContext
from timetrial_minigo.config import MiniGoConfig, refuse_contradictions
from timetrial_minigo.plugin import MiniGo
from timetrial_minigo.workload import MiniGoWorkload

CONF = Path(timetrial_minigo.__file__).parent / "conf" / "workload"


@dataclass
class OneOf:
    """A backend whose other ranks have nothing to say."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def all_gather(self, values: list[float]) -> list[list[float]]:
        return [values if rank == self.rank else [0.0] * len(values) for rank in range(self.world_size)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., MiniGoWorkload]:
    """`(option, *overrides, rank, world, seed)` to the workload, its model built and in place."""

    def make_workload(name: str, *overrides: str, rank: int = 0, world: int = 1, seed: int = 1) -> MiniGoWorkload:
        node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), OmegaConf.from_dotlist(list(overrides)))
        config: Any = SimpleNamespace(data=SimpleNamespace(source="files"))
        ctx = RunContext(config=config, run_dir=tmp_path, seed=seed)
        ctx.backend = OneOf(rank, world)  # pyright: ignore[reportAttributeAccessIssue]
        ctx.mesh = Mesh(arrange([], world), rank)
        ctx.offers = lambda seam, default: default
        ctx.feed = iter
        settings = validate(MiniGoConfig, node, "workload")
        refuse_contradictions(settings)
        workload = MiniGo(settings).make_workload(ctx)
        ctx.workload, ctx.model = workload, workload.build_model()
        ctx.infer = lambda data: workload.infer(ctx.model, data)
        return workload

    return make_workload
