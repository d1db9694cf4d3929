"""The files of a run folder: result.json, system.json, evidence.json and metrics.jsonl.

result.json has a schema (`result.schema.json` beside this file) and exists from the first second on with the status
`running`, so that a run that is killed leaves a result that is not a success.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import psutil

from core.api.batch import Position
from core.api.config import SubmissionConfig
from core.api.errors import TimetrialError
from core.api.files import read_json, write_json

RESULT_SCHEMA = 2
_SOFTWARE = ("timetrial", "torch", "torchvision", "torchaudio", "transformers", "hydra-core", "mlperf-logging", "numpy")


class Metrics:
    """metrics.jsonl: one line for each block of steps and each evaluation. `offset`, from a checkpoint, cuts it back to
    where it ended when that was saved. On ranks other than 0 (not `enabled`) it writes nowhere."""

    def __init__(self, run_dir: Path, enabled: bool, offset: int) -> None:
        self._file: IO[str] | None = None
        path = run_dir / "metrics.jsonl"
        try:
            if enabled:
                path.touch()
                os.truncate(path, offset)
                self._file = path.open("a")
        except OSError as error:
            raise TimetrialError(f"cannot write {error.filename}: {error.strerror}; choose another run_dir") from None

    def write(self, position: Position, **values: Any) -> None:
        """One line."""
        if self._file:
            line = {"step": position.step, "epoch": position.epoch, "samples": position.samples, **values}
            print(json.dumps(line), file=self._file, flush=True)

    def offset(self) -> int:
        """Its length in bytes, for a checkpoint."""
        return self._file.tell() if self._file else 0


def utc(seconds: float | None = None) -> str:
    """A Unix time, by default the present one, as ISO 8601 in UTC."""
    moment = time.time() if seconds is None else seconds
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat(timespec="milliseconds")


def update_result(run_dir: Path, **fields: Any) -> dict[str, Any]:
    """Writes the fields into result.json; returns all that it holds then."""
    result = {"schema": RESULT_SCHEMA, **read_json(run_dir / "result.json"), **fields}
    write_json(run_dir / "result.json", result)
    return result


def write_failure(run_dir: Path, error: Mapping[str, Any]) -> None:
    """Ends result.json with a failure: `error` has status, kind, message, rank and step."""
    entry = {key: error.get(key) for key in ("kind", "message", "rank", "step")}
    status = error.get("status", "failed")
    update_result(run_dir, status=status, time_to_train_s=None, ended_at=utc(), error=entry)


def software() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    return {name: d.version for name in _SOFTWARE for d in importlib.metadata.distributions(name=name)}


def describe_system(submission: SubmissionConfig, world_size: int, ranks_per_node: int) -> dict[str, Any]:
    """system.json: this machine, in the fields that MLPerf's system description asks for, plus the versions that matter
    here. Strings where the checker expects strings; sizes in GB (10^9 bytes)."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models, sockets = re.findall(r"model name\s*: (.*)", info), set(re.findall(r"physical id\s*: (\d+)", info))
    frequency, count = psutil.cpu_freq(), torch.accelerator.device_count()
    accelerator = torch.get_device_module().get_device_properties(0) if count else None
    return {
        **submission.system,
        "submitter": submission.org, "division": submission.division, "status": submission.status,
        "system_name": submission.platform,
        "number_of_nodes": str(max(1, world_size // ranks_per_node)),
        "host_processors_per_node": str(len(sockets) or 1), "host_processor_vcpu_count": str(psutil.cpu_count() or 0),
        "host_processor_model_name": models[0] if models else platform.processor(),
        "host_processor_core_count": str(psutil.cpu_count(logical=False) or 0),
        "host_processor_frequency": f"{frequency.max or frequency.current:.0f} MHz" if frequency else "",
        "host_memory_capacity": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "host_storage_capacity": f"{shutil.disk_usage('.').total / 1e9:.0f} GB",
        "accelerators_per_node": str(count), "accelerator_model_name": accelerator.name if accelerator else "",
        "accelerator_memory_capacity": f"{accelerator.total_memory / 1e9:.0f} GB" if accelerator else "",
        "framework": f"PyTorch {torch.__version__}", "other_software_stack": software(),
        "operating_system": platform.platform(), "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
