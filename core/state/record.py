"""What a run leaves behind: result_0.txt (mllog), metrics.jsonl, evidence.json, system.json and result.json.

result.json is a versioned schema and exists from the first second on with the status `running`, so that a run that is
killed leaves a result that is not a success.
"""

import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import psutil
from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger

from core.api.config import SubmissionConfig
from core.api.errors import TimetrialError
from core.api.types import Position, RunContext

RESULT_SCHEMA = 1
_SOFTWARE = ("timetrial", "torch", "torchvision", "torchaudio", "transformers", "hydra-core", "mlperf-logging", "numpy")


class Record:
    """The logs of one run. `offsets`, from a checkpoint, cut the logs back to where they stood when it was saved.
    `mllog` is the official logger; on ranks other than 0 (not `enabled`) it writes nowhere."""

    def __init__(self, run_dir: Path, enabled: bool, offsets: Mapping[str, int] | None) -> None:
        self.continued = bool(offsets)
        self._files: dict[str, IO[str]] = {}
        logger = logging.Logger("timetrial.mllog", logging.INFO)  # one run's lines must not reach another's log
        self.mllog = MLLogger(logger, root_dir=str(Path(__file__).parents[2]))
        try:
            for name in ("result_0.txt", "metrics.jsonl") if enabled else ():
                path = run_dir / name
                path.touch()
                os.truncate(path, (offsets or {}).get(name, 0))
                self._files[name] = path.open("a")
        except OSError as error:
            raise TimetrialError(f"cannot write {error.filename}: {error.strerror}; choose another run_dir") from None
        logger.addHandler(logging.StreamHandler(self._files["result_0.txt"]) if enabled else logging.NullHandler())
        if not self.continued:
            self.mllog.event(constants.CACHE_CLEAR, False)  # an ordinary user cannot flush the system's caches
            self.mllog.start(constants.INIT_START)

    def init_stop(self, ctx: RunContext) -> None:
        """The header that the official checker wants, the end of initialisation and the start of the clock."""
        if self.continued:
            return
        workload, submission = ctx.workload, {"benchmark": ctx.workload.spec.benchmark, **vars(ctx.config.submission)}
        header = {
            f"submission_{key}": submission[key] for key in ("benchmark", "org", "division", "status", "platform")
        }
        header |= {key: getattr(workload, key) for key in ("train_samples", "eval_samples", "global_batch_size")}
        accumulation = constants.GRADIENT_ACCUMULATION_STEPS
        header |= {constants.SEED: ctx.seed, accumulation: ctx.figures.get(accumulation, 1), **workload.log_values()}
        for key, value in header.items():
            self.mllog.event(key, value)
        for name in workload.weight_names(ctx.model):
            self.mllog.event(constants.WEIGHTS_INITIALIZATION, None, {"tensor": name})
        self.mllog.end(constants.INIT_STOP)
        self.mllog.start(constants.RUN_START)

    def metrics(self, position: Position, **values: Any) -> None:
        """One line of metrics.jsonl."""
        if self._files:
            line = {"step": position.step, "epoch": position.epoch, "samples": position.samples, **values}
            print(json.dumps(line), file=self._files["metrics.jsonl"], flush=True)

    def offsets(self) -> dict[str, int]:
        """How long each log is, for a checkpoint."""
        return {name: file.tell() for name, file in self._files.items()}


def new_run_name(what: str) -> str:
    """<date>-<time>-<what>-<id>: unique even for two runs that start in the same second."""
    return f"{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}-{what}-{secrets.token_hex(3)}"


def write_json(path: Path, tree: Any) -> None:
    """Replaces the file in one step, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(tree, indent=2, default=str) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What the file holds; {} where it does not exist or holds no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def update_result(run_dir: Path, **fields: Any) -> None:
    write_json(run_dir / "result.json", {"schema": RESULT_SCHEMA, **read_json(run_dir / "result.json"), **fields})


def write_failure(run_dir: Path, error: Mapping[str, Any]) -> None:
    """Ends result.json with a failure: `error` has status, kind, message, rank and step."""
    entry = {key: error.get(key) for key in ("kind", "message", "rank", "step")}
    update_result(run_dir, status=error.get("status", "failed"), time_to_train_s=None, error=entry)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_system(submission: SubmissionConfig, world_size: int) -> dict[str, Any]:
    """system.json: this machine, in the fields that MLPerf's system description asks for, plus the versions that matter
    here. Strings where the checker expects strings; sizes in GB (10^9 bytes)."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models, sockets = re.findall(r"model name\s*: (.*)", info), set(re.findall(r"physical id\s*: (\d+)", info))
    software = {name: d.version for name in _SOFTWARE for d in importlib.metadata.distributions(name=name)}
    frequency, count = psutil.cpu_freq(), torch.accelerator.device_count()
    accelerator = torch.get_device_module().get_device_properties(0) if count else None
    return {
        **submission.system,
        "submitter": submission.org, "division": submission.division, "status": submission.status,
        "system_name": submission.platform,
        "number_of_nodes": str(max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))),
        "host_processors_per_node": str(len(sockets) or 1), "host_processor_vcpu_count": str(psutil.cpu_count() or 0),
        "host_processor_model_name": models[0] if models else platform.processor(),
        "host_processor_core_count": str(psutil.cpu_count(logical=False) or 0),
        "host_processor_frequency": f"{frequency.max or frequency.current:.0f} MHz" if frequency else "",
        "host_memory_capacity": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "host_storage_capacity": f"{shutil.disk_usage('.').total / 1e9:.0f} GB",
        "accelerators_per_node": str(count), "accelerator_model_name": accelerator.name if accelerator else "",
        "accelerator_memory_capacity": f"{accelerator.total_memory / 1e9:.0f} GB" if accelerator else "",
        "framework": f"PyTorch {torch.__version__}", "other_software_stack": software,
        "operating_system": platform.platform(), "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
