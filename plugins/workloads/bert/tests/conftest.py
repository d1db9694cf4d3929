"""What the tests of this plugin share: a workload built from its real YAML, without a run around it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import timetrial_bert
from core.config import DataConfig, validate
from core.types import RunContext
from timetrial_bert.plugin import Bert, BertConfig
from timetrial_bert.workload import BertWorkload

CONF = Path(timetrial_bert.__file__).parent / "conf" / "workload"
REPO = Path(__file__).parents[4]

MakeWorkload = Callable[..., BertWorkload]


@dataclass
class OneOf:
    """A backend whose other ranks have nothing to say."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def all_gather(self, values: list[float]) -> list[list[float]]:
        return [values if rank == self.rank else [0.0] * len(values) for rank in range(self.world_size)]


def config_of(name: str, *overrides: str) -> BertConfig:
    node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), OmegaConf.from_dotlist(list(overrides)))
    return validate(BertConfig, node, "workload")


@pytest.fixture
def make(tmp_path: Path) -> MakeWorkload:
    def make_workload(
        name: str, *overrides: str, rank: int = 0, world: int = 1, seed: int = 1, **data: Any
    ) -> BertWorkload:
        values = {"source": "real", "root": None, "max_bad": 0, "workers": 0, **data}
        config: Any = SimpleNamespace(data=validate(DataConfig, OmegaConf.create(values), "data"))
        ctx = RunContext(config=config, run_dir=tmp_path, seed=seed)
        ctx.backend = OneOf(rank, world)  # pyright: ignore[reportAttributeAccessIssue]
        ctx.component = lambda name, default: default
        ctx.feed = iter
        return Bert(config_of(name, *overrides)).make_workload(ctx)

    return make_workload


@pytest.fixture
def real_text() -> Path:
    """The shared sample: a folder of WikiText files."""
    folder = Path(os.environ.get("TIMETRIAL_REALDATA", REPO.parent / "shared" / "data")) / "text"
    if not folder.is_dir():
        pytest.skip(f"no real text at {folder}: set TIMETRIAL_REALDATA")
    return folder
