"""With this opt a whole training step can be captured: its spec says so, and on a GPU it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from core.api.hooks import hookimpl
from core.api.types import WorkloadSpec
from core.compose.discovery import Installed, discover
from core.compose.resolve import plugin_manager
from core.testing.cli import environment, run_cli

pytestmark = pytest.mark.numbers

STEP = Path(__file__).parent.parent / "bench" / "step.py"
GPU = ("workload=maskrcnn", "backend=single", "backend.device=cuda", "deterministic=false")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Uncapturable:
    """Gives a workload of whose step nothing can be captured."""

    @hookimpl
    def make_workload(self) -> Any:
        return SimpleNamespace(spec=WorkloadSpec(interface=1, summary="", benchmark="maskrcnn"))


def opts(*names: str) -> tuple[list[Installed], dict[str, Any]]:
    registry = discover()
    found = [registry.find("opt", name) for name in names]
    return found, {"opt": {o.name: OmegaConf.load(o.conf_dir / "opt" / f"{o.name}.yaml") for o in found}}


@pytest.mark.parametrize("names", [("static_detection", "cuda_graphs"), ("cuda_graphs", "static_detection")])
def test_an_opt_that_captures_sees_a_step_that_can_be_captured_whichever_lies_inside(names: tuple[str, str]) -> None:
    if "cuda_graphs" not in discover().names("opt"):
        pytest.skip("the opt cuda_graphs is not installed")
    plugins, config = opts(*names)
    workload = plugin_manager(plugins, config, [Uncapturable()]).hook.make_workload(ctx=None)
    assert workload.spec.capture == "step"


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
