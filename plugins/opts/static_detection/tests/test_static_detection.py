"""Fixed shapes give the baseline's losses and detections, and a training step asks the host for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import ops

from core.testing.cli import environment, run_ranks
from timetrial_static_detection.fixed import Fixed, overlap, suppress

CPU = torch.device("cpu")


def boxes(*shape: int, seed: int, side: float = 100.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * side
    return torch.cat([corner, corner + 5 + torch.rand(*shape, 2, generator=generator) * side / 2], dim=-1)


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


def test_one_call_for_all_levels_pools_what_torchvision_pools() -> None:
    features = pyramid()
    pool = ops.MultiScaleRoIAlign(list(features), 7, 2, canonical_scale=96)
    regions = ops.clip_boxes_to_image(boxes(2, 40, seed=4, side=80), (96, 96))
    expected = pool(features, list(regions), [(96, 96)] * 2)
    found = Fixed(1, 1, CPU).region_features(pool, features, regions, (96, 96))
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    wanted = torch.autograd.grad((expected * weights).sum(), list(features.values()))
    given = torch.autograd.grad((found * weights).sum(), list(features.values()))
    torch.testing.assert_close(given, wanted)


def test_candidates_beyond_the_capacity_are_counted() -> None:
    scores, candidates = torch.full((2, 30, 3), 0.5), boxes(2, 30, 3, seed=6)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, 5:] = False
    fixed = Fixed(10, 40, CPU)
    fixed.detections(scores, candidates, real, 10, 0.05, 0.5)
    assert fixed.figures()["over_capacity"] == 1


def host_synchronisations(*overrides: str) -> dict[str, int]:
    """Of one training step of the embedded workload, by operation; bench/step.py counts them."""
    script = Path(__file__).parent.parent / "bench" / "step.py"
    small = ("workload=maskrcnn", "workload.train_scenes=64", "workload.global_batch_size=4", *overrides)
    done = subprocess.run([sys.executable, script, *small], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["host_synchronisations"]


def test_the_host_waits_for_nothing_in_a_training_step() -> None:
    baseline = host_synchronisations()
    assert baseline["torchvision.nms.default"] == 4  # one an image
    assert baseline["aten.nonzero.default"] >= 4
    assert host_synchronisations("+opt=static_detection") == {}


def test_losses_equal_the_baselines_over_twenty_steps(tmp_path: Path) -> None:
    arguments = ("workload=maskrcnn", "workload.train_scenes=80", "workload.global_batch_size=4", "stop.steps=20")
    baseline = run_ranks(*arguments, run_dir=tmp_path / "baseline").expect(4)
    fixed = run_ranks(*arguments, "+opt=static_detection", run_dir=tmp_path / "fixed").expect(4)
    torch.testing.assert_close(torch.tensor(fixed.losses), torch.tensor(baseline.losses), rtol=1e-3, atol=1e-4)
    assert fixed.evidence["static_detection"]["figures"]["unsettled"] == 0
