"""The log of a closed run, and the rules' schedule."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlperf_logging
import pytest
from omegaconf import OmegaConf

import timetrial_maskrcnn
from core.config import validate
from core.testing.cli import run_ranks
from timetrial_maskrcnn.plugin import MaskRCNNConfig
from timetrial_maskrcnn.weights import CLOSED_NAMES
from timetrial_maskrcnn.workload import MaskRCNNWorkload

PACKAGE = Path(mlperf_logging.__file__).parent
RULES = PACKAGE / "compliance_checker" / "training_1.1.0"
POINTS = json.loads((PACKAGE / "rcp_checker" / "training_1.1.0" / "rcps_maskrcnn.json").read_text())


def closed(**changes: Any) -> MaskRCNNWorkload:
    path = Path(timetrial_maskrcnn.__file__).parent / "conf" / "workload" / "maskrcnn_mlperf.yaml"
    config = validate(MaskRCNNConfig, OmegaConf.merge(OmegaConf.load(path), changes), "workload")
    data = SimpleNamespace(root=None, workers=0, source="synthetic")
    return MaskRCNNWorkload(None, config, SimpleNamespace(config=SimpleNamespace(data=data)))  # pyright: ignore


@pytest.mark.parametrize("batch", [48, 64, 96, 128])
def test_learning_rate_and_decay_follow_from_the_batch_as_at_the_reference_points(batch: int) -> None:
    point, workload = POINTS[f"maskrcnn_ref_{batch}"]["Hyperparams"], closed(global_batch_size=batch)
    assert workload.base_learning_rate == pytest.approx(point["opt_base_learning_rate"])
    assert workload.decay_steps == point["opt_learning_decay_steps"]
    assert workload.learning_rate(workload.decay_steps[1]) == pytest.approx(0.01 * workload.base_learning_rate)


def test_the_closed_configuration_is_a_reference_convergence_point() -> None:
    workload, point = closed(), POINTS["maskrcnn_ref_96"]
    assert workload.global_batch_size == point["BS"]
    assert workload.config.warmup_steps == point["Hyperparams"]["opt_learning_rate_warmup_steps"]
    assert workload.config.warmup_factor == point["Hyperparams"]["opt_learning_rate_warmup_factor"]
    assert [target.value for target in workload.targets] == [0.377, 0.339]


def test_a_closed_run_logs_every_key_and_tensor_of_the_rules(
    source: Any, prepare: Callable[..., subprocess.CompletedProcess[str]], small: tuple[str, ...], tmp_path: Path
) -> None:
    assert prepare(source.write()).returncode == 0
    run = run_ranks(
        *small, "submission.division=closed", f"data.root={tmp_path / 'out'}", "stop.epochs=1",
        "workload.backbone=resnet50", run_dir=tmp_path / "run",
    ).expect(4)  # fmt: skip
    log = (run.run_dir / "result_0.txt").read_text()
    events = [json.loads(line.partition(":::MLLOG ")[2]) for line in log.splitlines()]
    wanted = set()
    for rules in ("common", "closed_common", "closed_maskrcnn"):
        entries = re.findall(r"NAME:\s+(\w+)\s+REQ:\s+(\w+(?:\(\w+\))?)", (RULES / f"{rules}.yaml").read_text())
        wanted |= {name for name, need in entries if need in ("EXACTLY_ONE", "AT_LEAST_ONE")}
    assert len(wanted) > 20
    assert wanted <= {event["key"] for event in events}
    names = re.findall(r'"((?:FPN|RPN|ROI)\w+)"', (RULES / "closed_maskrcnn.yaml").read_text())
    assert len(names) == 21
    assert sorted(CLOSED_NAMES) == sorted(names)
    assert sorted(re.findall(r'"tensor": "([^"]+)"', log)) == sorted(names)
    (accuracy,) = (event["value"] for event in events if event["key"] == "eval_accuracy")
    assert set(accuracy) == {"BBOX", "SEGM"}


def test_an_open_run_passes_the_official_checker(tmp_path: Path) -> None:
    arguments = ("workload=maskrcnn", "workload.train_scenes=16", "workload.eval_scenes=4", "stop.epochs=2")
    log = run_ranks(*arguments, run_dir=tmp_path / "run").expect(4).run_dir / "result_0.txt"
    checker = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "1.1.0"]
    checked = subprocess.run([*checker, "--werror", str(log)], capture_output=True, text=True, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
