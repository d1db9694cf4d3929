"""What the tests of this plugin share: a workload built from its real YAML, without a run around it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.testing.contexts import lone_workload
from timetrial_bert.workload import BertWorkload

REPO = Path(__file__).parents[4]

MakeWorkload = Callable[..., BertWorkload]


@pytest.fixture
def make(tmp_path: Path) -> MakeWorkload:
    """`(option, *overrides, rank, world, seed, **data)` to the workload: see `lone_workload`."""
    return functools.partial(lone_workload, tmp_path)


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
