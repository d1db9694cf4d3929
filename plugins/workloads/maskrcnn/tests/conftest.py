"""A small COCO folder, and the command that prepares one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlperf_logging
import numpy as np
import pytest
from PIL import Image

import core.prepare
from core.testing.cli import run_program

REPO = Path(__file__).parents[4]
RULES = Path(mlperf_logging.__file__).parent / "compliance_checker" / "training_1.1.0"
SMALL = (
    "workload=maskrcnn_mlperf", "workload.pretrained=random", "workload.backbone=small", "workload.width=8",
    "workload.fpn_channels=16", "workload.box_head_width=16", "workload.mask_head_layers=[16]",
    "workload.anchor_sizes=[16,32,64,96,128]", "workload.min_size=64", "workload.max_size=128",
    "workload.global_batch_size=4", "workload.region_budget=16", "workload.proposals_before_nms=50",
    "workload.proposals_train=50", "workload.proposals_eval=30", "workload.lr_warmup_steps=5",
    "workload.least_score=0.001",
)  # fmt: skip
"""The closed workload, small enough for seconds."""


class Source:
    """A COCO folder under construction: `images` and `annotations` may be changed before `write`."""

    def __init__(self, folder: Path, count: int = 8) -> None:
        self.folder = folder
        self.splits: dict[str, dict[str, Any]] = {}
        generator = np.random.default_rng(5)
        for split in ("train2017", "val2017"):
            (folder / split).mkdir(parents=True)
            images, annotations = [], []
            for number in range(1, count + 1):
                width, height = (100, 80) if number % 2 else (80, 100)
                name = f"{number:012}.jpg"
                Image.fromarray(generator.integers(0, 255, (height, width, 3), np.uint8)).save(folder / split / name)
                images.append({"id": number, "file_name": name, "width": width, "height": height})
                annotations.append(self.object(number, number))
            categories = [{"id": 3, "name": "car"}, {"id": 17, "name": "cat"}]
            self.splits[split] = {"images": images, "annotations": annotations, "categories": categories}

    @staticmethod
    def object(number: int, image: int, box: tuple[float, ...] = (10, 20, 30, 40), **more: Any) -> dict[str, Any]:
        x, y, w, h = box
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        base = {"id": number, "image_id": image, "category_id": 3 if number % 2 else 17, "iscrowd": 0, "area": w * h}
        return {**base, "bbox": list(box), "segmentation": [polygon], **more}

    @property
    def train(self) -> dict[str, Any]:
        return self.splits["train2017"]

    def write(self) -> Path:
        (self.folder / "annotations").mkdir(exist_ok=True)
        for split, content in self.splits.items():
            (self.folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        return self.folder


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "coco")


@pytest.fixture
def small() -> tuple[str, ...]:
    return SMALL


@pytest.fixture
def closed_keys() -> set[str]:
    """Every key that the rules ask a closed log for."""
    wanted = set[str]()
    for rules in ("common", "closed_common", "closed_maskrcnn"):
        entries = re.findall(r"NAME:\s+(\w+)\s+REQ:\s+(\w+(?:\(\w+\))?)", (RULES / f"{rules}.yaml").read_text())
        wanted |= {name for name, need in entries if need in ("EXACTLY_ONE", "AT_LEAST_ONE")}
    assert len(wanted) > 20
    return wanted


@pytest.fixture
def passes_the_official_checker(tmp_path: Path) -> Callable[[Path], None]:
    """Of the open rules: `passes_the_official_checker(run_dir)`."""

    def check(run_dir: Path) -> None:
        checker = ("mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "1.1.0", "--werror")
        command = [sys.executable, "-m", *checker, str(run_dir / "result_0.txt")]
        checked = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert checked.returncode == 0, checked.stdout + checked.stderr

    return check


def events(run_dir: Path) -> list[dict[str, Any]]:
    """Of the run's log."""
    lines = (run_dir / "result_0.txt").read_text().splitlines()
    return [json.loads(line.partition(":::MLLOG ")[2]) for line in lines]


@pytest.fixture
def logged() -> Callable[[Path], list[dict[str, Any]]]:
    return events


@pytest.fixture
def realdata() -> Path:
    folder = Path(os.environ.get("TIMETRIAL_REALDATA", REPO.parent / "shared" / "data")) / "coco"
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder}: set TIMETRIAL_REALDATA")
    return folder


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`prepare(source, *overrides)` runs `core.prepare` into tmp_path / "out", in a forked process."""

    def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
        arguments = ["workload=maskrcnn_mlperf", f"source={folder}", f"out={tmp_path / 'out'}", "data.workers=0"]
        (done,) = run_program(Path(core.prepare.__file__), *arguments, *overrides, nodes="0")
        return subprocess.CompletedProcess(arguments, done.code, done.stdout, done.stderr)

    return run
