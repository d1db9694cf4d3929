"""Average precision: what is written gives what is reported, by either library, for any number of ranks."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import coco as pycocotools
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval

from core.testing.cli import Outcome, run_program, run_ranks
from timetrial_maskrcnn import evaluation
from timetrial_maskrcnn.scenes import SIDE, Scenes

pytestmark = pytest.mark.numbers

SHORT = (
    "workload=maskrcnn", "workload.train_scenes=8", "workload.eval_scenes=21", "workload.eval.batch_size=8",
    "workload.eval.first=1", "stop.epochs=1", "workload.least_score=0.0001", "checkpoint.every_steps=1",
    "checkpoint.at_end=false", "backend=gloo",
)  # fmt: skip
"""One step, and an evaluation in three batches."""
ORACLE = Path(__file__).with_name("oracle.py")


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


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Outcome]:
    """`oracle(ranks)` is a run whose qualities lie far from 0 and 1, and above the targets."""

    @functools.cache
    def run(ranks: int) -> Outcome:
        run_dir = tmp_path_factory.mktemp("oracle") / "run"
        first, *_ = run_program(ORACLE, *SHORT, f"run_dir={run_dir}", nodes="0" * ranks)
        return replace(first, run_dir=run_dir).expect(0)

    return run


LIBRARIES = {"pycocotools": (pycocotools.COCO, COCOeval), "faster_coco_eval": (COCO, COCOeval_faster)}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", evaluation.METRICS)
def test_the_written_files_give_the_reported_quality_by_either_library(
    library: str, kind: str, oracle: Callable[[int], Outcome]
) -> None:
    read, judge = LIBRARIES[library]
    truth = read(str(oracle(1).run_dir / "detections" / "annotations.json"))
    found = truth.loadRes(str(oracle(1).run_dir / "detections" / "detections.json"))
    judgement = judge(truth, found, kind)
    for part in (judgement.evaluate, judgement.accumulate, judgement.summarize):
        part()
    reported = oracle(1).result["quality"][evaluation.METRICS[kind]]
    assert 0.3 < reported < 0.7
    assert reported == pytest.approx(judgement.stats[0], abs=1e-9)


@pytest.mark.distributed
def test_two_ranks_report_what_one_reports(oracle: Callable[[int], Outcome]) -> None:
    one, two = oracle(1), oracle(2)
    assert two.result["world_size"] == 2
    assert written(two)[1] == written(one)[1]
    assert two.result["quality"] == one.result["quality"]


@pytest.mark.distributed
def test_two_ranks_detect_what_one_detects(tmp_path: Path) -> None:
    """The same weights: a run of one rank is saved before its evaluation, and two ranks take over from there."""
    one = run_ranks(*SHORT, run_dir=tmp_path / "one").expect(4)
    resumed = (f"resume={one.run_dir}", "resume_changed=true", "launch.nproc=2")
    two = run_ranks(*SHORT, *resumed, run_dir=tmp_path / "two").expect(4)
    assert one.result["steps"] == two.result["steps"] == 1
    assert len(written(one)[1]) > 100
    assert written(two)[1] == written(one)[1]


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
