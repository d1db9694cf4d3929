"""Matching, sampling and suppression, against torchvision's own and by their defining properties."""

from __future__ import annotations

import pytest
import torch
from torchvision import ops
from torchvision.models.detection._utils import BoxCoder, Matcher

from timetrial_maskrcnn import regions
from timetrial_maskrcnn.boxes import decode, encode

pytestmark = pytest.mark.numbers


def boxes(count: int, seed: int, side: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * side / 2], dim=1)


def test_overlaps_are_torchvisions_and_minus_one_where_nothing_is() -> None:
    some, objects = boxes(50, 1), boxes(4, 2)
    labels = torch.tensor([3, 1, 0, 2])
    iou = regions.overlaps(some[None], objects[None], labels[None])[0]
    torch.testing.assert_close(iou[labels > 0], ops.box_iou(objects, some)[labels > 0])
    assert (iou[2] == -1).all()


def test_offsets_are_those_of_torchvisions_coder_and_none_is_infinite() -> None:
    weights = (10.0, 10.0, 5.0, 5.0)
    coder, some, objects = BoxCoder(weights), boxes(60, 14), boxes(60, 15)
    offsets = encode(objects, some, weights)
    torch.testing.assert_close(offsets, coder.encode_single(objects, some))
    torch.testing.assert_close(decode(offsets, some, weights), objects, rtol=1e-5, atol=1e-4)
    several = torch.randn(60, 3, 4, generator=torch.Generator().manual_seed(16)) * 20  # some beyond the largest growth
    expected = coder.decode_single(several.flatten(1), some).view(60, 3, 4)
    torch.testing.assert_close(decode(several, some[:, None], weights), expected)
    flat = torch.tensor([[5.0, 5, 5, 9]])
    assert torch.isfinite(torch.stack([encode(flat, some[:1], weights), encode(some[:1], flat, weights)])).all()


def test_anchors_match_as_torchvisions_matcher_says() -> None:
    anchors, objects = boxes(400, 3), boxes(5, 4)
    expected = Matcher(0.7, 0.3, allow_low_quality_matches=True)(ops.box_iou(objects, anchors))
    foreground, background, matched = regions.anchor_targets(
        anchors, objects[None], torch.ones(1, 5, dtype=torch.int64), torch.tensor([7]), 10_000, 1.0, 0.7, 0.3
    )
    torch.testing.assert_close(foreground[0], expected >= 0)
    torch.testing.assert_close(background[0], expected == Matcher.BELOW_LOW_THRESHOLD)
    torch.testing.assert_close(matched[0][expected >= 0], expected[expected >= 0])


def test_the_budget_is_kept_and_foreground_has_its_share_at_most() -> None:
    anchors, objects = boxes(2000, 5), boxes(6, 6)
    labels = torch.ones(1, 6, dtype=torch.int64)
    foreground, background, _ = regions.anchor_targets(
        anchors, objects[None], labels, torch.tensor([1]), 16, 0.25, 0.3, 0.2
    )
    assert foreground.sum() == 4
    assert (foreground.sum(), background.sum()) == (4, 12)
    assert not (foreground & background).any()


def test_an_image_without_objects_teaches_background_only() -> None:
    nothing = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64)
    foreground, background, _ = regions.anchor_targets(boxes(100, 8), *nothing, torch.tensor([1]), 16, 0.5, 0.7, 0.3)
    assert (foreground.sum(), background.sum()) == (0, 16)
    proposals, real = boxes(20, 9)[None], torch.ones(1, 20, dtype=torch.bool)
    anchors = torch.arange(20)[None]
    _, labels, _ = regions.region_targets(proposals, real, anchors, *nothing, torch.tensor([1]), 8, 0.5, 0.5)
    assert (labels == 0).all()


def test_regions_come_foreground_first_and_missing_ones_are_marked() -> None:
    objects = torch.tensor([[[10.0, 10, 40, 40], [60, 60, 90, 90], [0, 0, 0, 0]]])
    labels = torch.tensor([[4, 2, 0]])
    near = torch.tensor([[[11.0, 10, 41, 40], [59, 60, 90, 91], [0, 50, 9, 59], [5, 5, 9, 9]]])
    real = torch.tensor([[True, True, True, False]])
    anchors = torch.tensor([[50, 7, 9, 0]])
    found, names, matched = regions.region_targets(near, real, anchors, objects, labels, torch.tensor([3]), 7, 0.5, 0.5)
    # Of two near ones and the two objects three may stay; then one background; the rest of seven is nothing.
    assert (names[0, :3] > 0).all()
    assert names[0, 3:].tolist() == [0, -1, -1, -1]
    torch.testing.assert_close(labels.gather(1, matched)[names > 0], names[names > 0])
    assert ops.box_iou(found[0, :3], objects[0, matched[0, :3]]).diagonal().min() > 0.5


def test_draws_belong_to_the_image_and_look_uniform() -> None:
    seeds = torch.tensor([12345678901234567, 2, 3])
    keys = torch.arange(5000)
    together, alone = regions.draws(seeds, keys), regions.draws(seeds[1:2], keys)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=0)
    counts = torch.histc(together, bins=20, min=0, max=1) / together.numel()
    assert ((counts - 0.05).abs() < 0.005).all()
    assert torch.corrcoef(together).triu(1).abs().max() < 0.05
    for row in together:
        assert torch.corrcoef(torch.stack([row[:-1], row[1:]]))[0, 1].abs() < 0.05


def test_proposals_are_the_survivors_of_suppression_level_by_level() -> None:
    generator = torch.Generator().manual_seed(11)
    some, scores = boxes(60, 10)[None], torch.rand(1, 60, generator=generator)
    found, real, anchors = regions.proposals(scores, some, [40, 20], torch.tensor([[120, 110]]), 15, 12, 0.5)
    clipped = ops.clip_boxes_to_image(some[0], (120, 110))
    chosen = torch.cat([scores[0, :40].topk(15).indices, scores[0, 40:].topk(15).indices + 40])
    levels = (chosen >= 40).long()
    kept = ops.batched_nms(clipped[chosen], scores[0][chosen], levels, 0.5)[:12]
    torch.testing.assert_close(found[0][real[0]], clipped[chosen][kept])
    assert anchors[0][real[0]].tolist() == chosen[kept].tolist()


def test_which_regions_are_chosen_does_not_depend_on_the_order_of_the_proposals() -> None:
    proposals, real = boxes(40, 17)[None], torch.ones(1, 40, dtype=torch.bool)
    anchors, objects, labels = torch.arange(100, 140)[None], boxes(2, 18)[None], torch.tensor([[3, 5]])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(19))
    seed = torch.tensor([6])
    one = regions.region_targets(proposals, real, anchors, objects, labels, seed, 8, 0.5, 0.5)
    other = regions.region_targets(proposals[:, order], real, anchors[:, order], objects, labels, seed, 8, 0.5, 0.5)
    torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_detections_are_best_first_without_the_background() -> None:
    generator = torch.Generator().manual_seed(12)
    scores = torch.rand(2, 30, 4, generator=generator).softmax(-1)
    candidates = boxes(2 * 30 * 4, 13).view(2, 30, 4, 4)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1] = False
    found, best, names = regions.detections(scores, candidates, real, 8, 0.2, 0.5)
    assert (best[0].diff() <= 0).all()
    assert (names[0][best[0] > 0] > 0).all()
    assert best[0, 0] == scores[0, :, 1:].max()
    assert (best[1] == 0).all()
    assert found.shape == (2, 8, 4)
