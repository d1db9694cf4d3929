"""Raw COCO folders through the real command: what is wrong is named, what the reference leaves out is counted."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.testing.cli import run_ranks
from core.testing.contexts import settings_that_are_prepared_with
from timetrial_maskrcnn.plugin import SPEC

Source = Any  # conftest.Source
Prepare = Callable[..., subprocess.CompletedProcess[str]]


def prepared(tmp_path: Path, part: str = "train") -> dict[str, Any]:
    return json.loads((tmp_path / "out" / f"{part}.json").read_text())


def test_a_sound_folder_is_kept_whole_and_the_second_time_only_verified(
    source: Source, prepare: Prepare, tmp_path: Path
) -> None:
    first = prepare(source.write())
    assert first.returncode == 0, first.stderr
    assert "prepared 8 train images, 8 train objects" in first.stdout
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert prepare(source.folder).returncode == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_the_spec_names_the_settings_that_a_folder_is_prepared_with(source: Source, tmp_path: Path) -> None:
    assert settings_that_are_prepared_with(source.write(), tmp_path / "out", "maskrcnn_mlperf") == SPEC.preparation


def test_a_finished_folder_serves_another_training_and_no_other_preparation(source: Source, prepare: Prepare) -> None:
    assert prepare(source.write()).returncode == 0
    training = ("workload.global_batch_size=8", "workload.flip=false", "workload.eval.batch_size=5")
    assert prepare(source.folder, *training).returncode == 0
    refused = prepare(source.folder, *training, "workload.eval_split=train2017")
    assert refused.returncode == 2
    assert "started with a different workload.eval_split (val2017, now train2017)" in refused.stderr


LEFT_OUT: dict[str, tuple[Callable[[Source], Any], str]] = {
    "a crowd region": (lambda s: s.train["annotations"].append(s.object(9, 1, iscrowd=1)), "1 train crowd regions"),
    "a box without area": (
        lambda s: s.train["annotations"].append(s.object(9, 1, (10, 10, 0, 20))),
        "1 train objects without area",
    ),
    "a box and its polygon outside the image": (
        lambda s: s.train["annotations"].append(s.object(9, 1, (150, 10, 20, 20))),
        "1 train objects outside their image",
    ),
    "a polygon outside the image in a box that is not": (
        lambda s: s.train["annotations"].append(s.object(9, 1, segmentation=[[-30, 5, -10, 5, -10, 25]])),
        "1 train objects outside their image",
    ),
    "an image without objects": (lambda s: s.train["annotations"].pop(), "1 train images without objects"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_the_reference_leaves_out_is_counted(case: str, source: Source, prepare: Prepare, tmp_path: Path) -> None:
    change, words = LEFT_OUT[case]
    change(source)
    done = prepare(source.write())
    assert done.returncode == 0, done.stderr
    assert f"{words} left out" in done.stdout
    kept = prepared(tmp_path)
    assert all(a["id"] <= 8 for a in kept["annotations"])
    assert {a["image_id"] for a in kept["annotations"]} == {image["id"] for image in kept["images"]}


def test_a_polygon_that_reaches_beyond_its_image_is_kept_and_trained_on(
    source: Source, prepare: Prepare, small: tuple[str, ...], tmp_path: Path
) -> None:
    source.train["annotations"][0] = source.object(1, 1, (-15, 40, 60, 80))
    assert prepare(source.write()).returncode == 0
    assert len(prepared(tmp_path)["annotations"]) == 8
    run = run_ranks(*small, f"data.root={tmp_path / 'out'}", "stop.epochs=1", run_dir=tmp_path / "run").expect(4)
    assert all(map(math.isfinite, run.losses))


def test_evaluation_keeps_crowd_regions_and_empty_images(source: Source, prepare: Prepare, tmp_path: Path) -> None:
    val = source.splits["val2017"]
    val["annotations"][-1] = source.object(8, 1, iscrowd=1)
    assert prepare(source.write()).returncode == 0
    kept = prepared(tmp_path, "eval")
    assert (len(kept["images"]), len(kept["annotations"])) == (8, 8)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:400])


WRONG: dict[str, tuple[Callable[[Source], Any], str]] = {
    "a missing image": (
        lambda s: (s.folder / "train2017" / "000000000003.jpg").unlink(),
        "train2017/000000000003.jpg: the image is missing",
    ),
    "a truncated image": (
        lambda s: truncate(s.folder / "train2017" / "000000000003.jpg"),
        "train2017/000000000003.jpg: the image is unreadable",
    ),
    "an image of another size": (
        lambda s: s.train["images"][2].update(width=90),
        "train2017/000000000003.jpg: the image is 100 x 80, not 90 x 80",
    ),
    "an object of no image": (
        lambda s: s.train["annotations"].append(s.object(9, 77)),
        "train2017 annotation 9: it belongs to image 77, which does not exist",
    ),
    "an object of no category": (
        lambda s: s.train["annotations"].append(s.object(9, 1, category_id=5)),
        "train2017 annotation 9: its category 5 does not exist",
    ),
    "a polygon of two points": (
        lambda s: s.train["annotations"].append(s.object(9, 1, segmentation=[[1, 2, 3, 4]])),
        "train2017 annotation 9: a polygon is not a list of three or more points",
    ),
    "a box that is not finite": (
        lambda s: s.train["annotations"].append(s.object(9, 1) | {"bbox": [1, 2, math.nan, 4]}),
        "train2017 annotation 9: its bbox is",
    ),
    "a mask of another size": (
        lambda s: s.train["annotations"].append(s.object(9, 1, segmentation={"size": [80, 90], "counts": [7200]})),
        "train2017 annotation 9: its mask has the size [80, 90], its image [80, 100]",
    ),
    "no segmentation": (
        lambda s: s.train["annotations"].append(s.object(9, 1, segmentation=[])),
        "train2017 annotation 9: it has no segmentation",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_may_be_passed_over(case: str, source: Source, prepare: Prepare) -> None:
    change, words = WRONG[case]
    change(source)
    refused = prepare(source.write())
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert words in last
    assert "data.max_bad=1" in last
    passed = prepare(source.folder, "data.max_bad=1")
    assert passed.returncode == 0, passed.stderr
    assert "1 bad" in passed.stdout


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_annotations_that_are_none_are_one_line(content: str | None, source: Source, prepare: Prepare) -> None:
    path = source.write() / "annotations" / "instances_val2017.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    refused = prepare(source.folder)
    assert refused.returncode == 1
    assert "instances_val2017.json" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr


def test_an_image_that_changed_since_is_named(
    source: Source, prepare: Prepare, small: tuple[str, ...], tmp_path: Path
) -> None:
    assert prepare(source.write()).returncode == 0
    image = source.folder / "train2017" / "000000000005.jpg"
    image.write_bytes(image.read_bytes() + b"x")
    run = run_ranks(*small, f"data.root={tmp_path / 'out'}", "stop.epochs=1", run_dir=tmp_path / "run").expect(1)
    assert "000000000005.jpg has changed" in run.stderr


def test_without_prepared_data_or_weights_the_remedy_is_said(
    source: Source, prepare: Prepare, small: tuple[str, ...], tmp_path: Path
) -> None:
    assert "core.prepare" in run_ranks(*small, run_dir=tmp_path / "none").expect(2).stderr
    assert prepare(source.write()).returncode == 0
    whole = ("workload=maskrcnn_mlperf", f"data.root={tmp_path / 'out'}", "workload.global_batch_size=4")
    assert "workload.pretrained" in run_ranks(*whole, run_dir=tmp_path / "run").expect(1).stderr


@pytest.mark.realdata
def test_real_photographs_are_prepared_trained_on_and_evaluated(
    prepare: Prepare, realdata: Path, small: tuple[str, ...], tmp_path: Path, closed_keys: set[str],
    logged: Callable[[Path], list[dict[str, Any]]], passes_the_official_checker: Callable[[Path], None],
) -> None:  # fmt: skip
    done = prepare(realdata, "data.workers=2")
    assert done.returncode == 0, done.stderr
    assert "69 train images, 577 train objects" in done.stdout
    run = run_ranks(*small, f"data.root={tmp_path / 'out'}", "stop.epochs=1", run_dir=tmp_path / "run").expect(4)
    assert run.result["samples"] == 69
    assert set(run.result["quality"]) == {"box_ap", "mask_ap"}
    passes_the_official_checker(run.run_dir)
    assert closed_keys - {"weights_initialization"} <= {event["key"] for event in logged(run.run_dir)}
