"""COCO images as examples: sizes, flips, masks, and batches of one orientation."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet50

from core.api.errors import DataError
from timetrial_maskrcnn import model, weights
from timetrial_maskrcnn.batch import collate
from timetrial_maskrcnn.coco import Coco, GroupedSampler, resized

Prepare = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def train(source: Any, prepare: Prepare, tmp_path: Path) -> Coco:
    source.train["annotations"].append(source.object(9, 1, (50, 30, 20, 10)))
    done = prepare(source.write())
    assert done.returncode == 0, done.stderr
    return Coco(tmp_path / "out", "train", "train2017", 160, 400, flip=True)


def test_sides_are_the_references() -> None:
    assert resized(640, 480, 800, 1333) == (1066, 800)  # not 1,067: the reference cuts off
    assert resized(480, 640, 800, 1333) == (800, 1066)
    assert resized(1000, 200, 800, 1333) == (1335, 267)  # nor 1,333: the shorter side is rounded first
    assert resized(800, 800, 800, 1333) == (800, 800)


def test_boxes_and_masks_follow_the_resized_image(train: Coco) -> None:
    example = train.example(0, seed=2)  # even: not mirrored
    assert example.image_CHW.shape == (3, 160, 200)
    torch.testing.assert_close(example.boxes_M4, torch.tensor([[20.0, 40, 80, 120], [100, 60, 140, 80]]))
    assert example.labels_M.tolist() == [1, 1]
    for box, mask in zip(example.boxes_M4, example.masks_MHW, strict=True):
        x1, y1, x2, y2 = box.int().tolist()
        assert mask[y1:y2, x1:x2].float().mean() > 0.95
        assert abs(int(mask.sum()) - (x2 - x1) * (y2 - y1)) < 0.1 * mask.sum()


def test_a_mirrored_example_mirrors_everything(train: Coco) -> None:
    plain, mirrored = train.example(0, seed=2), train.example(0, seed=3)
    torch.testing.assert_close(mirrored.image_CHW, plain.image_CHW.flip(2))
    torch.testing.assert_close(mirrored.masks_MHW, plain.masks_MHW.flip(2))
    torch.testing.assert_close(mirrored.boxes_M4[:, 0], 200 - plain.boxes_M4[:, 2])
    torch.testing.assert_close(mirrored.boxes_M4[:, 2], 200 - plain.boxes_M4[:, 0])


def test_an_image_to_be_evaluated_is_never_mirrored_and_knows_its_size(train: Coco) -> None:
    example = train.example(1)
    assert example.original == (100, 80)
    assert example.image_CHW.shape == (3, 200, 160)
    torch.testing.assert_close(example.image_CHW, train.example(1, seed=4).image_CHW)
    assert len(example.labels_M) == 0


def test_a_batch_is_padded_to_the_multiple(train: Coco) -> None:
    batch = collate([train.example(0, seed=2), train.example(1, seed=2)], None, 32)
    assert batch["images"].shape == (2, 3, 224, 224)
    assert batch["sizes"].tolist() == [[160, 200], [200, 160]]
    assert batch["labels"].tolist() == [[1, 1], [2, 0]]
    assert (batch["images"][0, :, 160:] == 0).all()
    assert (batch["masks"][1, 1] == 0).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_hold_one_orientation_and_every_image_comes_once(world_size: int) -> None:
    wide = np.random.default_rng(3).random(103) < 0.7
    seen, mixed = list[int](), 0
    sizes = {"examples": 103, "global_batch": 8, "world_size": world_size}
    ranks = [GroupedSampler(**sizes, rank=rank, wide=wide) for rank in range(world_size)]
    for shares in zip(*(sampler.epoch(5) for sampler in ranks), strict=True):
        batch = np.concatenate([share.indices for share in shares])
        seen += batch.tolist()
        mixed += len(set(wide[batch])) > 1
    assert sorted(seen) == list(range(103))
    assert mixed <= 2


def test_pretrained_weights_are_read_from_either_format(tmp_path: Path) -> None:
    states = resnet50().state_dict()
    save_file(states, tmp_path / "r50.safetensors")
    torch.save(states, tmp_path / "r50.pth")
    for name in ("r50.safetensors", "r50.pth"):
        body = resnet50()
        del body.fc
        weights.load(body, tmp_path / name)
        torch.testing.assert_close(body.layer3[1].conv2.weight, states["layer3.1.conv2.weight"])


def test_an_untrained_resnet_keeps_its_features_within_bounds() -> None:
    config = SimpleNamespace(backbone="resnet50", pretrained="random", fpn_channels=16)
    torch.manual_seed(1)
    backbone, _ = model._backbone(config, 3)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 64))
    assert all(0.02 < level.std() < 3 for level in features.values())


def test_weights_that_do_not_fit_are_refused_and_nothing_is_executed(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"conv1.weight": Path("anything")}, tmp_path / "pickle.pth")
    for name in ("other.safetensors", "pickle.pth", "missing.pth"):
        with pytest.raises(DataError, match=r"torchvision's resnet50"):
            weights.load(resnet50(), tmp_path / name)
