"""What of the nccl backend needs no GPU: finding the devices, and saying that there are none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from timetrial_torchdist import devices
from timetrial_torchdist.config import NoSettings
from timetrial_torchdist.nccl import Nccl

GPUS = ["GPU-aa11", "GPU-ab22", "GPU-cc33"]


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        (None, 3),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("2, 0", 2),
        ("0,7,1", 1),  # the first invalid entry hides those after it
        ("0,-1,1", 1),
        ("1,1", 0),
        ("GPU-cc,GPU-aa11", 2),
        ("GPU-a", 0),  # ambiguous
        ("MIG-55", 1),
        ("MIG-55,MIG-66", 1),
    ],
)
def test_cuda_visible_devices_is_respected(selection: str | None, count: int) -> None:
    assert devices.visible(GPUS, selection) == count


def test_without_a_driver_the_problem_names_the_other_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> list[str]:
        raise LookupError("NVML Shared Library Not Found")

    monkeypatch.setattr(devices, "_uuids", no_driver)
    assert devices.probe().problem == "no NVIDIA GPU or driver was found; use backend=gloo (CPU) or backend=auto"


def test_hidden_gpus_are_a_problem_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_uuids", lambda: GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides all of its 3 GPUs" in devices.probe().problem
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert devices.probe().count == 2


def test_the_command_line_refuses_it_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "core.run", "workload=toy", "backend=nccl", f"run_dir={tmp_path / 'run'}"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=hidden)
    assert done.returncode == 2
    assert "use backend=gloo (CPU) or backend=auto" in done.stderr
    assert "Traceback" not in done.stderr


def test_cublas_gets_a_fixed_workspace_only_where_runs_must_repeat() -> None:
    plugin = Nccl(NoSettings())
    assert plugin.environment(SimpleNamespace(deterministic=True)) == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert plugin.environment(SimpleNamespace(deterministic=False)) == {}
