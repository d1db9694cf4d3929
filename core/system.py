"""What this machine is, in the fields that MLPerf's system description asks for, plus the versions that matter here.

What cannot be read off the machine (cooling, networking) is left as an empty string for a submitter to fill in.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from core.config import SubmissionConfig

_SOFTWARE = ("timetrial", "torch", "torchvision", "torchaudio", "transformers", "hydra-core", "mlperf-logging", "numpy")
_FILLED_BY_SUBMITTER = (
    "host_processor_caches", "host_processor_interconnect", "host_storage_type", "host_networking",
    "host_networking_topology", "host_memory_configuration", "accelerator_host_interconnect", "accelerator_frequency",
    "accelerator_on-chip_memories", "accelerator_memory_configuration", "accelerator_interconnect",
    "accelerator_interconnect_topology", "cooling", "hw_notes", "sw_notes",
)  # fmt: skip


def describe_system(submission: SubmissionConfig, world_size: int) -> dict[str, Any]:
    """The contents of system.json. Strings where the checker expects strings; sizes in GB (10^9 bytes)."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models, sockets = re.findall(r"model name\s*: (.*)", info), set(re.findall(r"physical id\s*: (\d+)", info))
    frequency, software = psutil.cpu_freq(), {d.name: d.version for d in importlib.metadata.distributions()}
    count = torch.accelerator.device_count()
    accelerator = torch.get_device_module().get_device_properties(0) if count else None
    return {
        **dict.fromkeys(_FILLED_BY_SUBMITTER, ""),
        "submitter": submission.org,
        "division": submission.division,
        "status": submission.status,
        "system_name": submission.platform,
        "number_of_nodes": str(max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))),
        "host_processors_per_node": str(len(sockets) or 1),
        "host_processor_model_name": models[0] if models else platform.processor(),
        "host_processor_core_count": str(psutil.cpu_count(logical=False) or 0),
        "host_processor_vcpu_count": str(psutil.cpu_count() or 0),
        "host_processor_frequency": f"{frequency.max or frequency.current:.0f} MHz" if frequency else "",
        "host_memory_capacity": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "host_storage_capacity": f"{shutil.disk_usage('.').total / 1e9:.0f} GB",
        "accelerators_per_node": str(count),
        "accelerator_model_name": accelerator.name if accelerator else "",
        "accelerator_memory_capacity": f"{accelerator.total_memory / 1e9:.0f} GB" if accelerator else "",
        "framework": f"PyTorch {torch.__version__}",
        "other_software_stack": {name: software[name] for name in _SOFTWARE if name in software},
        "operating_system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
