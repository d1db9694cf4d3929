"""Average precision: what is written gives what is reported, by either library, for any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import coco as pycocotools
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval

from core.testing.cli import Outcome, run_ranks
from core.testing.suites import cached_run
from timetrial_maskrcnn import evaluation
from timetrial_maskrcnn.scenes import SIDE, Scenes

SHORT = (
    "workload=maskrcnn", "workload.train_scenes=640", "workload.eval_scenes=21", "workload.eval.batch_size=8",
    "workload.eval.first=1", "stop.epochs=1", "workload.lr_warmup_steps=60", "workload.least_score=0.0001",
    "checkpoint.every_steps=80", "checkpoint.at_end=false",
)  # fmt: skip
"""One epoch of 80 steps, after which both qualities are above 0."""


def written(run: Outcome) -> tuple[dict, list]:
    folder = run.run_dir / "detections"
    return tuple(json.loads((folder / f"{name}.json").read_text()) for name in ("annotations", "detections"))


def perfect(scenes: Scenes) -> list[dict]:
    """The ground truth as detections, the third of them moved by a few pixels."""
    found = []
    for number, truth in enumerate(scenes.annotations()["annotations"]):
        mask = rle.decode(truth["segmentation"])
        moved = np.roll(mask, 4, axis=1) if number % 3 == 0 else mask
        encoded = rle.encode(np.asfortranarray(moved))
        x, y, w, h = truth["bbox"]
        segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        box = [x + 4 * (number % 3 == 0), y, w, h]
        record = {"image_id": truth["image_id"], "category_id": truth["category_id"], "score": 1 / (number + 1)}
        found.append({**record, "bbox": box, "segmentation": segmentation})
    return found


def test_two_libraries_agree_on_the_average_precision() -> None:
    scenes = Scenes(20, held_out=True)
    found, annotations = perfect(scenes), scenes.annotations()
    quality = evaluation.average_precision(annotations, found)
    assert 0.5 < quality["mask_ap"] < 1
    truth = COCO(annotations)
    for kind, metric in evaluation.METRICS.items():
        other = COCOeval_faster(truth, truth.loadRes(found), kind)
        other.evaluate()
        other.accumulate()
        other.summarize()
        assert quality[metric] == pytest.approx(other.stats[0], abs=1e-9)


def test_no_detection_at_all_is_a_quality_of_zero() -> None:
    assert evaluation.average_precision(Scenes(3, held_out=True).annotations(), []) == {"box_ap": 0.0, "mask_ap": 0.0}


def short() -> Outcome:
    return cached_run(*SHORT).expect(4)


LIBRARIES = {"pycocotools": (pycocotools.COCO, COCOeval), "faster_coco_eval": (COCO, COCOeval_faster)}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", evaluation.METRICS)
def test_the_written_files_give_the_reported_quality_by_either_library(library: str, kind: str) -> None:
    read, judge = LIBRARIES[library]
    truth = read(str(short().run_dir / "detections" / "annotations.json"))
    found = truth.loadRes(str(short().run_dir / "detections" / "detections.json"))
    judgement = judge(truth, found, kind)
    for part in (judgement.evaluate, judgement.accumulate, judgement.summarize):
        part()
    reported = short().result["quality"][evaluation.METRICS[kind]]
    assert reported > 0
    assert reported == pytest.approx(judgement.stats[0], abs=1e-9)


@pytest.mark.distributed
def test_two_ranks_report_what_one_reports(tmp_path: Path) -> None:
    """The same weights: a run of one rank is saved before its evaluation, and two ranks take over from there."""
    one = short()
    resumed = (f"resume={one.run_dir}", "resume_changed=true", "backend=gloo", "launch.nproc=2")
    two = run_ranks(*SHORT, *resumed, run_dir=tmp_path / "two").expect(4)
    assert one.result["steps"] == two.result["steps"] == 80
    assert min(one.result["quality"].values()) > 0
    assert written(two)[1] == written(one)[1]
    assert two.result["quality"] == one.result["quality"]


def test_a_pasted_mask_covers_the_box_it_was_cut_from() -> None:
    scenes = Scenes(5, held_out=True)
    for number in range(5):
        example = scenes.example(number)
        for box, mask in zip(example.boxes_M4, example.masks_MHW, strict=True):
            x1, y1, x2, y2 = box.int().tolist()
            cut = mask[y1:y2, x1:x2].float()
            again = evaluation.paste(cut, tuple(box.tolist()), SIDE, SIDE)
            np.testing.assert_array_equal(again, mask.numpy())


def test_a_mask_beyond_the_image_is_cut_off() -> None:
    whole = evaluation.paste(torch.ones(28, 28), (-5.0, 90.0, 10.0, 120.0), SIDE, SIDE)
    assert whole.sum() == 10 * 6
