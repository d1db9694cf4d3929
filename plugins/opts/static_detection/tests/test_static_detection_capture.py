"""With this opt a whole training step can be captured: the workload says so, and on a GPU it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.api.hooks import hookimpl
from core.api.types import Capture
from core.testing.cli import environment, run_cli
from core.testing.contexts import hooks_of, lone_workload
from core.testing.matrix import installed_opts, spec_of
from timetrial_static_detection.plugin import StaticDetection, StaticDetectionConfig

pytestmark = pytest.mark.numbers

STEP = Path(__file__).parent.parent / "bench" / "step.py"
GPU = ("workload=maskrcnn", "backend=single", "backend.device=cuda", "deterministic=false")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Inner:
    """Gives the workload as it is without an opt."""

    def __init__(self, workload: Any) -> None:
        self.workload = workload

    @hookimpl
    def make_workload(self) -> Any:
        return self.workload


def test_the_whole_step_of_the_workload_can_be_captured_with_it(tmp_path: Path) -> None:
    plain = lone_workload(tmp_path, "maskrcnn")
    assert plain.capture == Capture()
    opt = StaticDetection(StaticDetectionConfig(rounds=1, candidates=1, objects=None))
    assert hooks_of(Inner(plain), opt).make_workload(ctx=plain.ctx).capture == Capture(step=True)


def test_what_captures_encloses_it() -> None:
    if "cuda_graphs" not in installed_opts():
        pytest.skip("the opt cuda_graphs is not installed")
    assert "static_detection" in spec_of("cuda_graphs").wraps


@pytest.mark.gpu
@needs_gpu
def test_torch_counts_no_synchronisation_in_a_step_on_a_gpu() -> None:
    def count(*overrides: str) -> int:
        done = subprocess.run(
            [sys.executable, STEP, "--untimed", *GPU, *overrides], env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])["cuda_synchronisations"]

    assert count() > 0
    assert count("+opt=static_detection") == 0


@pytest.mark.gpu
@needs_gpu
def test_a_whole_step_is_captured_on_a_gpu_and_gives_the_eager_losses(tmp_path: Path) -> None:
    eager = run_cli(*GPU, "+opt=static_detection", "stop.steps=30", run_dir=tmp_path / "eager").expect(4)
    together = "+opt=[static_detection,cuda_graphs]"
    captured = run_cli(*GPU, together, "stop.steps=30", run_dir=tmp_path / "captured").expect(4)
    assert captured.evidence["cuda_graphs"]["figures"]["train"]["replays"] > 0
    torch.testing.assert_close(torch.tensor(captured.losses), torch.tensor(eager.losses), rtol=1e-2, atol=1e-3)
