"""JPEG folders: layout errors, damaged files, and what reading them must not depend on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.api.errors import DataError
from timetrial_resnet.crops import central_crop, random_box
from timetrial_resnet.imagefolder import CHANNEL_MEANS, IGNORED
from timetrial_resnet.workload import ResNetWorkload

MakeWorkload = Callable[..., ResNetWorkload]

SMALL = ("global_batch_size=4", "eval.batch_size=4", "image_size=32", "arch=resnet18", "width=4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, 4 + 2 images each, of several sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee", "cat"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40 + 30 * i, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.{'jpg' if i else 'JPEG'}")
    return tmp_path / "images"


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def test_counts_and_classes_come_from_the_folder(make: MakeWorkload, folder: Path) -> None:
    workload = make("resnet_mlperf", *SMALL, root=str(folder))
    workload.check_data()
    assert (workload.train_samples, workload.eval_samples) == (12, 6)
    assert workload.build_model().get_parameter("fc.bias").numel() == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f / "val"), r".*val does not exist.*train/<class>"),
        (lambda f: shutil.rmtree(f), r".*train does not exist"),
        (lambda f: [p.unlink() for p in (f / "train" / "bee").iterdir()], r"bee has no images"),
        (lambda f: (f / "val" / "dog").mkdir(), r"class dog .* is not in"),
    ],
)
def test_a_wrong_layout_is_named(make: MakeWorkload, folder: Path, change: Callable[[Path], Any], message: str) -> None:
    change(folder)
    with pytest.raises(DataError, match=message):
        make("resnet_mlperf", *SMALL, root=str(folder)).check_data()


def _epoch(workload: Any, first: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    workload.check_data()
    return [batch.data for batch in workload.batches(1, first)]


def test_images_do_not_depend_on_workers_world_size_or_where_reading_starts(make: MakeWorkload, folder: Path) -> None:
    whole = _epoch(make("resnet_mlperf", *SMALL, root=str(folder)))
    threads = _epoch(make("resnet_mlperf", *SMALL, root=str(folder), workers=3))
    ranks = [_epoch(make("resnet_mlperf", *SMALL, root=str(folder), rank=r, world=2)) for r in range(2)]
    rest = _epoch(make("resnet_mlperf", *SMALL, root=str(folder)), 2)
    assert len(whole) == 3
    for i in range(3):
        assert torch.equal(whole[i][0], threads[i][0])
        assert torch.equal(whole[i][0], torch.cat([ranks[0][i][0], ranks[1][i][0]]))
    assert torch.equal(whole[2][0], rest[0][0]) and torch.equal(whole[2][1], rest[0][1])


def test_a_damaged_image_stops_the_run_and_is_named(make: MakeWorkload, folder: Path) -> None:
    damage(folder / "train" / "cat" / "2.jpg")
    with pytest.raises(DataError, match=r"unreadable image .*cat/2.jpg"):
        _epoch(make("resnet_mlperf", *SMALL, root=str(folder), workers=2))


def test_an_allowed_damaged_image_is_passed_over_and_counted(
    make: MakeWorkload, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder / "train" / "cat" / "2.jpg")
    workload = make("resnet_mlperf", *SMALL, root=str(folder), max_bad=1)
    for _ in range(2):
        data = _epoch(workload)
    labels, images = torch.cat([d[1] for d in data]), torch.cat([d[0] for d in data])
    assert sorted(labels.tolist()) == [IGNORED] + [0] * 4 + [1] * 4 + [2] * 3
    assert images[labels == IGNORED].abs().max() < 1  # the mean, rounded to a whole number
    assert capsys.readouterr().err.count("cat/2.jpg") == 1
    workload.evaluate(lambda data: torch.zeros(len(data[1]), 3))
    assert workload.ctx.figures["bad_examples"] == [str(folder / "train" / "cat" / "2.jpg")]
    resumed = make("resnet_mlperf", *SMALL, root=str(folder), max_bad=1)
    resumed.load_state_dict(workload.state_dict())
    assert resumed.images.bad == workload.images.bad


def test_ranks_that_hold_too_many_damaged_images_together_stop_together(make: MakeWorkload, folder: Path) -> None:
    for i in (0, 1):
        damage(next((folder / "val" / "bee").glob(f"{i}.*")))
    workload = make("resnet_mlperf", *SMALL, root=str(folder), max_bad=1, world=2)
    workload.check_data()
    other_rank = [0.0, float(workload.train_samples + 3)]
    workload.ctx.backend.others = {1: other_rank}
    with pytest.raises(DataError, match="and 1 more"):
        workload.evaluate(lambda data: torch.zeros(len(data[1]), 3))


def test_evaluation_counts_each_image_once_and_a_damaged_one_as_wrong(make: MakeWorkload, folder: Path) -> None:
    damage(folder / "val" / "bee" / "1.jpg")
    workload = make("resnet_mlperf", *SMALL, root=str(folder), max_bad=1)
    workload.check_data()
    everything_is_a_bee = lambda data: torch.tensor([[0.0, 1.0, 0.0]]).repeat(len(data[1]), 1)  # noqa: E731
    assert workload.evaluate(everything_is_a_bee) == {"top1": 1 / 6}


def test_random_boxes_keep_to_the_references_ranges() -> None:
    rng = np.random.default_rng(0)
    for width, height in ((500, 375), (60, 300)):
        for _ in range(200):
            left, top, right, bottom = random_box(width, height, rng)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            if (right - left, bottom - top) == (width, height):
                continue  # no attempt fitted
            assert 0.73 < (right - left) / (bottom - top) < 1.36
            assert (right - left) * (bottom - top) >= 0.1 * width * height


def test_central_crop_is_the_middle(tmp_path: Path) -> None:
    """A white square of 7/8 of the shorter side, in the middle of a black image, fills the crop."""
    pixels = np.zeros((256, 400, 3), np.uint8)
    pixels[16:240, 88:312] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.asarray(central_crop(str(tmp_path / "x.png"), 224)).min() == 255


@pytest.mark.realdata
def test_real_photographs_train_and_evaluate(make: MakeWorkload, real_images: Path) -> None:
    workload = make("resnet_mlperf", *SMALL, "global_batch_size=32", root=str(real_images), workers=2)
    workload.check_data()
    images, labels = next(iter(workload.batches(1, 0))).data
    assert images.shape == (32, 3, 32, 32) and labels.max() < 8
    model = workload.build_model()
    assert torch.isfinite(workload.loss(model, (images, labels))["loss"])
    assert 0 <= workload.evaluate(lambda data: model(data[0]).detach())["top1"] <= 1
    assert -max(CHANNEL_MEANS) - 1 < images.min() < images.max() < 256
