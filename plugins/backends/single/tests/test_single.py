"""The backend of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from core.api.errors import NotHereError
from timetrial_single.plugin import OneProcess, Single, SingleConfig, probe


def test_collectives_of_one_rank() -> None:
    backend = OneProcess(torch.device("cpu"))
    assert backend.all_gather([0.1, 2]) == [[0.1, 2.0]]
    assert backend.broadcast({"a": 1}) == {"a": 1}
    backend.synchronize()
    backend.shutdown()


def test_it_starts_no_process_group() -> None:
    plugin, model = Single(SingleConfig(device="cpu")), nn.Linear(2, 2)
    backend = plugin.init_backend(SimpleNamespace())
    assert backend.device == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert plugin.verify(SimpleNamespace(model=model, device=backend.device)).active


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused_and_auto_takes_the_cpu() -> None:
    with pytest.raises(NotHereError, match=r"use backend\.device=cpu"):
        Single(SingleConfig(device="cuda")).init_backend(SimpleNamespace())
    assert Single(SingleConfig(device="auto")).init_backend(SimpleNamespace()).device.type == "cpu"


def test_hidden_gpus_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (probe().provides, probe().count) == ({"cpu"}, 1)


def test_the_command_line_refuses_two_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "core.run", "workload=toy", "backend=single", "launch.nproc=2"]
    command.append(f"run_dir={tmp_path / 'run'}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "backend=single can serve 1 of 2 ranks here" in done.stderr


def test_one_rank_on_each_of_two_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "it serves 1 rank, not 2" in probe().problem
