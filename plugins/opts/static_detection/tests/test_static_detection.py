"""Fixed shapes give the baseline's losses and detections, and a training step asks the host for nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.nn import functional as F
from torchvision import ops
from torchvision.models.detection.roi_heads import paste_masks_in_image

from core.api.types import Batch
from core.testing.cli import environment, run_ranks
from core.testing.contexts import hooks_of, lone_context
from core.testing.suites import cached_run
from timetrial_static_detection.fixed import Fixed, overlap, suppress
from timetrial_static_detection.pasting import masks, run_lengths
from timetrial_static_detection.plugin import StaticDetection, StaticDetectionConfig

CPU = torch.device("cpu")
STEP = Path(__file__).parent.parent / "bench" / "step.py"


def boxes(*shape: int, seed: int, side: float = 100.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * side
    return torch.cat([corner, corner + 5 + torch.rand(*shape, 2, generator=generator) * side / 2], dim=-1)


@pytest.mark.numbers
@pytest.mark.parametrize("iou", [0.1, 0.5, 0.7])
def test_suppression_by_rounds_is_the_greedy_one(iou: float) -> None:
    some = boxes(6, 200, seed=1)
    may = torch.rand(6, 200, generator=torch.Generator().manual_seed(2)) < 0.9
    kept, unsettled = suppress(may, overlap(some) > iou, rounds=30)
    assert not unsettled.any()
    for row_boxes, row_may, row_kept in zip(some, may, kept, strict=True):
        chosen = row_may.nonzero().flatten()
        scores = torch.arange(len(chosen), 0, -1).float()
        expected = chosen[ops.nms(row_boxes[chosen], scores, iou)]
        assert row_kept.nonzero().flatten().tolist() == sorted(expected.tolist())


def test_a_chain_longer_than_the_rounds_is_reported() -> None:
    left = torch.arange(20.0)[:, None] * 4  # each box is near its neighbours only
    chain = torch.cat([left, torch.zeros(20, 1), left + 10, torch.full((20, 1), 10.0)], dim=1)[None]
    near = overlap(chain) > 0.3
    all_may = torch.ones(1, 20, dtype=torch.bool)
    assert suppress(all_may, near, rounds=3)[1].item()
    kept, unsettled = suppress(all_may, near, rounds=20)
    assert not unsettled.item()
    assert kept[0].tolist() == [True, False] * 10


def pyramid(channels: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sides = (24, 12, 6, 3)
    return {
        str(i): torch.randn(2, channels, s, s, generator=generator, requires_grad=True) for i, s in enumerate(sides)
    }


@pytest.mark.numbers
def test_one_call_for_all_levels_pools_what_torchvision_pools() -> None:
    features = pyramid()
    pool = ops.MultiScaleRoIAlign(list(features), 7, 2, canonical_scale=96)
    regions = ops.clip_boxes_to_image(boxes(2, 40, seed=4, side=80), (96, 96))
    expected = pool(features, list(regions), [(96, 96)] * 2)
    found = Fixed(1, 1, CPU).region_features(pool, features, regions, (96, 96))
    torch.testing.assert_close(found, expected)
    corner = torch.tensor([[[95.5, 95.5, 96.0, 96.0]]]).expand(2, -1, -1)  # small: of the finest level, and of no other
    alone = {name: level * (name == "0") for name, level in features.items()}
    small = [Fixed(1, 1, CPU).region_features(pool, maps, corner, (96, 96)) for maps in (features, alone)]
    torch.testing.assert_close(*small, rtol=0, atol=0)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    wanted = torch.autograd.grad((expected * weights).sum(), list(features.values()))
    given = torch.autograd.grad((found * weights).sum(), list(features.values()))
    torch.testing.assert_close(given, wanted)


def test_boxes_of_a_diverged_network_are_none_and_can_be_pooled() -> None:
    fixed, pool = Fixed(2, 20, CPU), ops.MultiScaleRoIAlign(list(pyramid()), 7, 2, canonical_scale=96)
    lost = torch.full((2, 30, 4), torch.nan)
    for scores in (torch.full((2, 30), torch.nan), torch.full((2, 30), 0.5)):
        proposals, real, _ = fixed.proposals(scores, lost, [20, 10], torch.tensor([[96, 96]] * 2), 10, 8, 0.5)
        assert not real.any()
        assert torch.isfinite(fixed.region_features(pool, pyramid(), proposals, (96, 96))).all()
        every_class = scores[..., None].expand(-1, -1, 3), lost[:, :, None].expand(-1, -1, 3, -1)
        found, best, labels = fixed.detections(*every_class, torch.ones(2, 30, dtype=torch.bool), 5, 0.05, 0.5)
        assert (found.sum(), best.sum(), labels.sum()) == (0, 0, 0)


def probabilities(count: int, seed: int) -> Tensor:
    """Smooth masks [count, 28, 28], of many shapes."""
    rough = torch.randn(count, 1, 7, 7, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(3 * rough, 28, mode="bicubic")[:, 0].sigmoid()


def sampled(mask_ss: Tensor, box: list[float], height: int, width: int) -> Tensor:
    """By definition: the mask's value [height, width] at each pixel's centre; 0 outside of the box's pixels."""
    x1, y1, x2, y2 = box
    x_w, y_h = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    down_hw, across_hw = torch.meshgrid((y_h - y1) / (y2 - y1), (x_w - x1) / (x2 - x1), indexing="ij")
    grid_hw2 = torch.stack([across_hw, down_hw], dim=-1) * 2 - 1
    return F.grid_sample(mask_ss[None, None], grid_hw2[None], align_corners=False)[0, 0]


@pytest.mark.numbers
def test_masks_are_those_of_bilinear_sampling_and_torchvision_pastes_nearly_the_same() -> None:
    height, width, some = 90, 120, probabilities(60, seed=7)
    places = boxes(60, seed=8, side=90.0)
    places[:2] = torch.tensor(
        [[-20.0, -7.0, 60.0, 150.0], [100.0, 50.0, 100.4, 50.4]]
    )  # beyond the image; within a pixel
    encoded = masks(some, places, height, width)
    for shape, mask_ss, box in zip(encoded, some, places.tolist(), strict=True):
        values, found = sampled(mask_ss, box, height, width), torch.from_numpy(rle.decode(shape)).bool()
        settled = (values - 0.5).abs() > 1e-5
        assert torch.equal(found[settled], values[settled] >= 0.5)
    found = torch.stack([torch.from_numpy(rle.decode(shape)).bool() for shape in encoded])
    torchvisions = paste_masks_in_image(some[:, None], places, (height, width), padding=1)[:, 0] >= 0.5
    assert (found & torchvisions).sum() / (found | torchvisions).sum() > 0.85  # it rounds boxes to whole pixels


@pytest.mark.parametrize("part", [(0, 0, 12, 9), (3, 2, 5, 4), (0, 5, 12, 4), (4, 0, 8, 9), (2, 0, 3, 9)])
def test_run_lengths_are_those_of_the_library(part: tuple[int, int, int, int]) -> None:
    """`part` is left, top, width and height; where it is as high as the image, runs go on in the next column."""
    left, top, columns, rows = part
    generator = np.random.default_rng(3)
    for share in (0.0, 0.3, 0.9, 1.0):
        inside = generator.random((columns, rows)) < share
        whole = np.zeros((9, 12), dtype=np.uint8, order="F")
        whole[top : top + rows, left : left + columns] = inside.T
        runs = {"size": [9, 12], "counts": run_lengths(inside, left, top, 9, 12)}
        assert rle.frPyObjects(runs, 9, 12) == rle.encode(whole)


def test_room_for_objects_is_filled_up_or_cut_and_counted() -> None:
    data = {"boxes": boxes(2, 3, seed=9), "labels": torch.tensor([[1, 2, 3], [4, 0, 0]]), "images": torch.zeros(2, 1)}
    data["masks"] = torch.ones(2, 3, 5, 5, dtype=torch.uint8)
    fixed = Fixed(1, 1, CPU)
    (roomy,) = fixed.with_room([Batch(data, 2, 0.5)], 4)
    assert (roomy.samples, roomy.weight) == (2, 0.5)
    assert roomy.data["labels"].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
    assert roomy.data["masks"].shape == (2, 4, 5, 5)
    assert (roomy.data["boxes"][:, 3] == 0).all()
    assert fixed.figures()["over_objects"] == 0
    (cut,) = fixed.with_room([Batch(data, 2)], 2)
    torch.testing.assert_close(cut.data["boxes"], data["boxes"][:, :2])
    assert fixed.figures()["over_objects"] == 1


def test_training_batches_and_the_example_get_room_and_evaluation_has_no_objects() -> None:
    data = {"boxes": torch.zeros(1, 1, 4), "labels": torch.zeros(1, 1), "masks": torch.zeros(1, 1, 5, 5)}
    ctx = lone_context(Path(), "workload=toy")

    def objects(room: int | None, purpose: str) -> int:
        opt = StaticDetection(StaticDetectionConfig(rounds=1, candidates=1, objects=room))
        (batch,) = hooks_of(opt).transform(ctx=ctx, batches=[Batch(data, 1)], purpose=purpose)
        return batch.data["labels"].shape[1]

    assert [objects(4, purpose) for purpose in ("train", "warm_up", "evaluate")] == [4, 4, 1]
    assert objects(None, "train") == 1


def host_synchronisations(*overrides: str) -> dict[str, Any]:
    """Of one training step of the embedded workload, by operation; bench/step.py counts them."""
    small = ("workload=maskrcnn", "workload.train_scenes=64", "workload.global_batch_size=4", *overrides)
    done = subprocess.run(
        [sys.executable, STEP, "--untimed", *small], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_host_waits_for_nothing_in_a_training_step() -> None:
    baseline = host_synchronisations()["host_synchronisations"]
    assert baseline["torchvision.nms.default"] == 4  # one an image
    assert baseline["aten.nonzero.default"] >= 4
    assert host_synchronisations("+opt=static_detection")["host_synchronisations"] == {}


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "truth": lambda x: bool(x[0] > 0),
    "list": lambda x: x.tolist(),
    "host": lambda x: x.cpu(),
    "array": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.index_put_((x > 0,), torch.ones(())),
    "selection": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "constant": lambda x: x * torch.tensor(0.5),
    "suppression": lambda x: ops.nms(x.expand(2, 4), x[:2], 0.5),
}


@pytest.mark.parametrize("case", WAITING)
def test_the_count_of_host_synchronisations_misses_none(case: str) -> None:
    step = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("step", STEP))
    spec.loader.exec_module(step)
    values = torch.tensor([1.0, 0.0, 2.0, 3.0])
    with step.Waits() as waits:
        torch.where(values > 0, values * 2, 0.0).masked_fill(values > 1, 0.5)[torch.arange(2)].topk(1)
    assert waits == {}
    with step.Waits() as waits:
        WAITING[case](values)
    assert waits.total() >= 1


@pytest.mark.numbers
def test_losses_equal_the_baselines_over_twenty_steps_and_nothing_overflows(tmp_path: Path) -> None:
    # A quarter of the recipe's learning rate: at all of it, steps themselves amplify a difference of rounding.
    slow = ("workload.base_learning_rate=0.005", "workload.train_scenes=80", "workload.global_batch_size=4")
    arguments = ("workload=maskrcnn", *slow, "stop.steps=20")
    baseline = run_ranks(*arguments, run_dir=tmp_path / "baseline").expect(4)
    roomy = ("+opt=static_detection", "opt.static_detection.objects=5")
    fixed = run_ranks(*arguments, *roomy, run_dir=tmp_path / "fixed").expect(4)
    assert len(fixed.losses) == 20
    torch.testing.assert_close(torch.tensor(fixed.losses), torch.tensor(baseline.losses), rtol=1e-3, atol=1e-4)
    figures = fixed.evidence["static_detection"]["figures"]
    assert figures["images"] >= 80
    assert [figures[limit] for limit in ("unsettled", "over_candidates", "over_objects")] == [0, 0, 0]


SHORT = (
    "workload=maskrcnn", "workload.train_scenes=20", "workload.eval_scenes=4", "workload.global_batch_size=4",
    "workload.eval.first=1", "workload.lr_warmup_steps=5", "workload.least_score=0.0001", "stop.epochs=1",
    "workload.proposals_eval=10", "workload.detections=100",
)  # fmt: skip
"""Five steps and an evaluation with detections: none is left out for its rank, which the last bit could decide."""


@pytest.mark.numbers
def test_what_exceeds_a_limit_is_counted_in_the_evidence() -> None:
    tight = ("rounds=1", "candidates=5", "objects=1")
    settings = [f"opt.static_detection.{setting}" for setting in tight]
    evidence = cached_run(*SHORT, "+opt=static_detection", *settings).expect(4).evidence["static_detection"]
    for limit in ("unsettled", "over_candidates", "over_objects"):
        assert evidence["figures"][limit] > 0
        assert str(evidence["figures"][limit]) in evidence["summary"]


def detections(run_dir: Path) -> list[dict[str, Any]]:
    return json.loads((run_dir / "detections" / "detections.json").read_text())


def is_near(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    same = all(mine[key] == theirs[key] for key in ("image_id", "category_id"))
    score, box = pytest.approx(theirs["score"], abs=1e-5), pytest.approx(theirs["bbox"], abs=1e-3)
    return same and mine["score"] == score and mine["bbox"] == box


@pytest.mark.numbers
def test_an_evaluation_finds_what_the_baselines_finds(tmp_path: Path) -> None:
    """The same weights: the opt takes over from a baseline that was saved before its evaluation."""
    saved = ("checkpoint.every_steps=5", "checkpoint.at_end=false")
    baseline = run_ranks(*SHORT, *saved, run_dir=tmp_path / "baseline").expect(4)
    resumed = (f"resume={baseline.run_dir}", "resume_changed=true", "+opt=static_detection")
    fixed = run_ranks(*SHORT, *resumed, run_dir=tmp_path / "fixed").expect(4)
    expected, found = detections(baseline.run_dir), detections(fixed.run_dir)
    assert len(found) == len(expected) >= 12
    pixels = differing = 0
    for theirs in expected:
        (mine,) = (one for one in found if is_near(one, theirs))  # in whatever order two near scores put them
        ours, wanted = (rle.decode(d["segmentation"]) for d in (mine, theirs))
        pixels, differing = pixels + wanted.sum(), differing + (ours != wanted).sum()
    assert pixels > 100
    assert differing <= 0.01 * pixels
    figures = fixed.evidence["static_detection"]["figures"]
    assert figures["masks"] >= len(found)
    assert (figures["unsettled"], figures["over_candidates"]) == (0, 0)
