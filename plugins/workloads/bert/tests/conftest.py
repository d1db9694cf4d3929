"""What the tests of this plugin share: a workload built from its real YAML, without a run around it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import timetrial_bert
from core.api.config import DataConfig, validate
from core.api.types import RunContext
from timetrial_bert.config import BertConfig
from timetrial_bert.plugin import Bert
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


SETTINGS = ("workload.vocab_file=null", "workload.vocab_size=150", "workload.shard_mib=0.001", "workload.held_out=0.2")


def _command(source: Path, out: Path, *more: str) -> list[str]:
    arguments = ["workload=bert", f"source={source}", f"out={out}", "data.workers=0", *SETTINGS, *more]
    return [sys.executable, "-m", "core.prepare", *arguments]


def _prepare(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(source, out, *more), capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="session")
def prepare_command() -> Callable[..., list[str]]:
    """`(source, out, *overrides)` to the command line that prepares shards."""
    return _command


@pytest.fixture(scope="session")
def prepare_shards() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs that command."""
    return _prepare


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of made-up articles."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 8))) for _ in range(80)]
    for file in range(3):
        lines: list[str] = []
        for article in range(12):
            lines.append(f" = Article {file} {article} = ")
            lines += [" ".join(words[i] for i in rng.zipf(1.4, 9) % 80).capitalize() + "." for _ in range(8)]
        (folder / f"{file}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "shards"
    done = _prepare(source, out)
    assert done.returncode == 0, done.stderr
    return out
