"""What the tests of this plugin share: a workload built from its real YAML, without a run, and small speech."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from core.testing.contexts import lone_workload
from timetrial_rnnt.workload import RnntWorkload

REPO = Path(__file__).parents[4]
RATE = 16000

MakeWorkload = Callable[..., RnntWorkload]


@pytest.fixture
def make(tmp_path: Path) -> MakeWorkload:
    """`(option, *overrides, rank, world, device, seed, **data)` to the workload: see `lone_workload`."""
    return functools.partial(lone_workload, tmp_path)


@pytest.fixture
def real_speech() -> Path:
    """The shared sample: a folder laid out as LibriSpeech."""
    folder = Path(os.environ.get("TIMETRIAL_REALDATA", REPO.parent / "shared" / "data")) / "speech"
    if not folder.is_dir():
        pytest.skip(f"no real speech at {folder}: set TIMETRIAL_REALDATA")
    return folder


WORDS = {"ALPHA": 300, "BRAVO": 600, "CHARLIE": 1200, "DELTA": 2400}
"""Words of the small speech, each a tone of its frequency in Hz."""


def tones(words: list[str], rng: np.random.Generator, rate: int = RATE) -> np.ndarray[Any, np.dtype[np.float32]]:
    parts = []
    for word in words:
        time = np.arange(int(rate * rng.uniform(0.15, 0.3))) / rate
        parts += [0.3 * np.sin(2 * np.pi * WORDS[word] * time), np.zeros(rate // 20)]
    whole = np.concatenate(parts)
    return (whole + 0.01 * rng.standard_normal(len(whole))).astype(np.float32)


def write_chapter(folder: Path, name: str, count: int, seed: int, suffix: str = ".flac") -> None:
    """One chapter as LibriSpeech lays it out."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines: list[str] = []
    for number in range(count):
        words = [str(word) for word in rng.choice(list(WORDS), rng.integers(1, 5))]
        soundfile.write(folder / f"{name}-{number:04d}{suffix}", tones(words, rng), RATE)
        lines.append(f"{name}-{number:04d} {' '.join(words)}\n")
    (folder / f"{name}.trans.txt").write_text("".join(lines))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders to train on, of which one holds wav files, and one to evaluate on."""
    folder = tmp_path_factory.mktemp("speech")
    write_chapter(folder / "train-clean-100" / "1" / "1", "1-1", 20, 1)
    write_chapter(folder / "train-clean-100" / "1" / "2", "1-2", 12, 2)
    write_chapter(folder / "train-other-500" / "2" / "1", "2-1", 8, 3, ".wav")
    write_chapter(folder / "dev-clean" / "3" / "1", "3-1", 10, 4)
    return folder


SETTINGS = ("workload.vocab_size=16",)


def _command(source: Path, out: Path, *more: str) -> list[str]:
    arguments = ["workload=rnnt_mlperf", f"source={source}", f"out={out}", "data.workers=0", *SETTINGS, *more]
    return [sys.executable, "-m", "core.prepare", *arguments]


def _prepare(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(source, out, *more), capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="session")
def prepare_command() -> Callable[..., list[str]]:
    """`(source, out, *overrides)` to the command line that prepares speech."""
    return _command


@pytest.fixture(scope="session")
def prepare_speech() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs that command."""
    return _prepare


@pytest.fixture(scope="session")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "speech"
    done = _prepare(source, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def official_checker() -> Callable[[Path], None]:
    """Asserts that the log in a run folder passes MLCommons' checker, warnings included."""

    def check(run_dir: Path) -> None:
        command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training"]
        command += ["--ruleset", "1.1.0", "--werror", str(run_dir / "result_0.txt")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=run_dir, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return check
