"""What the tests of this plugin share: a workload built from its real YAML, without a run around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import timetrial_resnet
from core.api.config import DataConfig, validate
from core.api.types import RunContext
from timetrial_resnet.plugin import ResNet
from timetrial_resnet.workload import ResNetWorkload

CONF = Path(timetrial_resnet.__file__).parent / "conf" / "workload"
REPO = Path(__file__).parents[4]

MakeWorkload = Callable[..., ResNetWorkload]


@dataclass
class OneOf:
    """A backend whose other ranks have nothing to say."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def all_gather(self, values: list[float]) -> list[list[float]]:
        return [values if rank == self.rank else [0.0] + [-1.0] * (len(values) - 1) for rank in range(self.world_size)]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeWorkload]:
    def make_workload(
        name: str, *overrides: str, rank: int = 0, world: int = 1, seed: int = 1, **data: Any
    ) -> ResNetWorkload:
        values = {"source": "real", "root": None, "max_bad": 0, "workers": 0, **data}
        config: Any = SimpleNamespace(data=validate(DataConfig, OmegaConf.create(values), "data"))
        ctx = RunContext(config=config, run_dir=tmp_path, seed=seed)
        ctx.backend = OneOf(rank, world)  # pyright: ignore[reportAttributeAccessIssue]
        ctx.feed = iter
        node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), OmegaConf.from_dotlist(list(overrides)))
        return ResNet(validate(ResNet.Config, node, "workload")).make_workload(ctx)

    return make_workload


@pytest.fixture
def real_images() -> Path:
    """The shared sample in ImageFolder layout."""
    folder = Path(os.environ.get("TIMETRIAL_REALDATA", REPO.parent / "shared" / "data")) / "imagefolder"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set TIMETRIAL_REALDATA")
    return folder
