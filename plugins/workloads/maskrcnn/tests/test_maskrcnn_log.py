"""The log of a closed run, and the rules' schedule."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlperf_logging
import pytest

from core.testing.cli import run_cli, run_ranks
from core.testing.contexts import lone_workload
from timetrial_maskrcnn.weights import CLOSED_NAMES
from timetrial_maskrcnn.workload import MaskRCNNWorkload

PACKAGE = Path(mlperf_logging.__file__).parent
RULES = PACKAGE / "compliance_checker" / "training_1.1.0"
POINTS = json.loads((PACKAGE / "rcp_checker" / "training_1.1.0" / "rcps_maskrcnn.json").read_text())


def closed(*overrides: str) -> MaskRCNNWorkload:
    return lone_workload(Path(), "maskrcnn_mlperf", *overrides, source="synthetic")


@pytest.mark.parametrize("batch", [48, 64, 96, 128])
def test_learning_rate_and_decay_follow_from_the_batch_as_at_the_reference_points(batch: int) -> None:
    point, workload = POINTS[f"maskrcnn_ref_{batch}"]["Hyperparams"], closed(f"global_batch_size={batch}")
    assert workload.base_learning_rate == pytest.approx(point["opt_base_learning_rate"])
    assert workload.decay_steps == point["opt_learning_decay_steps"]
    assert workload.learning_rate(workload.decay_steps[1]) == pytest.approx(0.01 * workload.base_learning_rate)


def test_the_closed_configuration_is_a_reference_convergence_point() -> None:
    workload, point = closed(), POINTS["maskrcnn_ref_96"]
    assert workload.global_batch_size == point["BS"]
    assert workload.config.lr_warmup_steps == point["Hyperparams"]["opt_learning_rate_warmup_steps"]
    assert workload.config.lr_warmup_factor == point["Hyperparams"]["opt_learning_rate_warmup_factor"]
    assert [target.value for target in workload.targets] == [0.377, 0.339]


def test_a_closed_run_logs_every_key_and_tensor_of_the_rules(
    source: Any, prepare: Callable[..., subprocess.CompletedProcess[str]], small: tuple[str, ...], tmp_path: Path,
    closed_keys: set[str], logged: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    assert prepare(source.write()).returncode == 0
    run = run_ranks(
        *small, "submission.division=closed", f"data.root={tmp_path / 'out'}", "stop.epochs=1",
        "workload.backbone=resnet50", "checkpoint.at_end=false", run_dir=tmp_path / "run",
    ).expect(4)  # fmt: skip
    events = logged(run.run_dir)
    assert closed_keys <= {event["key"] for event in events}
    names = re.findall(r'"((?:FPN|RPN|ROI)\w+)"', (RULES / "closed_maskrcnn.yaml").read_text())
    assert len(names) == 21
    assert sorted(CLOSED_NAMES) == sorted(names)
    tensors = [event["metadata"]["tensor"] for event in events if event["key"] == "weights_initialization"]
    assert sorted(tensors) == sorted(names)
    (accuracy,) = (event["value"] for event in events if event["key"] == "eval_accuracy")
    assert set(accuracy) == {"BBOX", "SEGM"}


def test_an_open_run_passes_the_official_checker(
    tmp_path: Path, passes_the_official_checker: Callable[[Path], None]
) -> None:
    arguments = ("workload=maskrcnn", "workload.train_scenes=16", "workload.eval_scenes=4", "stop.epochs=2")
    passes_the_official_checker(run_ranks(*arguments, run_dir=tmp_path / "run").expect(4).run_dir)


@pytest.mark.convergence
@pytest.mark.parametrize("opts", ["", "static_detection", "static_detection,async_eval"])
def test_both_targets_are_reached(
    opts: str, tmp_path: Path, passes_the_official_checker: Callable[[Path], None]
) -> None:
    run = run_cli("workload=maskrcnn", "seed=1", f"opt=[{opts}]", run_dir=tmp_path / "run").expect(0)
    assert run.result["quality"]["box_ap"] >= 0.377
    assert run.result["quality"]["mask_ap"] >= 0.339
    assert all(evidence["active"] for evidence in run.evidence.values())
    passes_the_official_checker(run.run_dir)
