"""What this machine is, in the fields that MLPerf's system description asks for, plus the versions that matter here.

What cannot be read off the machine (cooling, networking) is left as an empty string for a submitter to fill in.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from core.config import SubmissionConfig

_PACKAGES = ("timetrial", "torch", "torchvision", "torchaudio", "transformers", "hydra-core", "mlperf-logging", "numpy")
_FILLED_BY_SUBMITTER = (
    "host_processor_caches", "host_processor_interconnect", "host_storage_type", "host_networking",
    "host_networking_topology", "host_memory_configuration", "accelerator_host_interconnect", "accelerator_frequency",
    "accelerator_on-chip_memories", "accelerator_memory_configuration", "accelerator_interconnect",
    "accelerator_interconnect_topology", "cooling", "hw_notes", "sw_notes",
)  # fmt: skip


def describe_system(submission: SubmissionConfig, world_size: int) -> dict[str, Any]:
    """The contents of system.json. Strings throughout where the checker expects strings; sizes in GB (10^9 bytes)."""
    accelerators, model, memory = _accelerators()
    nodes = max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    frequency = psutil.cpu_freq()
    return {
        **dict.fromkeys(_FILLED_BY_SUBMITTER, ""),
        "submitter": submission.org,
        "division": submission.division,
        "status": submission.status,
        "system_name": submission.platform,
        "number_of_nodes": str(nodes),
        "host_processors_per_node": str(_sockets()),
        "host_processor_model_name": _cpu_model(),
        "host_processor_core_count": str(psutil.cpu_count(logical=False) or 0),
        "host_processor_vcpu_count": str(psutil.cpu_count() or 0),
        "host_processor_frequency": f"{frequency.max or frequency.current:.0f} MHz" if frequency else "",
        "host_memory_capacity": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "host_storage_capacity": f"{shutil.disk_usage('.').total / 1e9:.0f} GB",
        "accelerators_per_node": str(accelerators),
        "accelerator_model_name": model,
        "accelerator_memory_capacity": memory,
        "framework": f"PyTorch {torch.__version__}",
        "other_software_stack": {name: v for name in _PACKAGES if (v := _version(name))},
        "operating_system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _accelerators() -> tuple[int, str, str]:
    if not torch.accelerator.is_available():
        return 0, "", ""
    properties = torch.get_device_module().get_device_properties(0)
    return torch.accelerator.device_count(), properties.name, f"{properties.total_memory / 1e9:.0f} GB"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _sockets() -> int:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return len({line for line in lines if line.startswith("physical id")}) or 1


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
