"""A run, as it is decided before a process starts. Saved as resolved.yaml; all that a worker process is given."""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

import core
from core.api.config import LaunchConfig, RunConfig, validate
from core.api.errors import UsageError
from core.api.mesh import Dimension
from core.compose.discovery import Installed, source_hash

PLAN_SCHEMA = 3

# Keys that may differ between a run and its continuation: they change where and how long it runs and who is told, not
# what it computes.
RUN_KEYS = (
    "run_dir", "resume", "resume_changed", "score_restarts", "stop", "checkpoint", "log_seconds", "submission",
    "launch", "tracker", "default_trackers", "record_hostname",
)  # fmt: skip


@dataclass(frozen=True)
class RunPlan:
    """What to run: the root configuration and the plugins."""

    config: dict[str, Any]
    """As composed, with interpolations kept, so that no secret from the environment is written to a file."""
    plugins: list[Installed]
    """All that decides the numbers: backend, opts from the innermost to the outermost, workload."""
    trackers: list[Installed]
    launcher: Installed
    seed: int
    world_size: int
    ranks_per_node: int
    dimensions: tuple[Dimension, ...]
    """The mesh of ranks, outermost first."""
    environment: dict[str, str]
    run_dir: str = ""
    """Where this start of the run writes; empty on the other ranks of an outer launcher, which rank 0 tells."""
    resume_from: str | None = None  # run folder whose newest checkpoint is the start; None begins anew
    restarts: int = 0
    changed: bool = False  # whether configuration, code or world size differ from the run that it continues

    @cached_property
    def root(self) -> RunConfig:
        """The validated configuration; `launch` is the launcher's own `Config`."""
        config = validate(RunConfig, OmegaConf.create(self.config), "")
        config.launch = validate(cast(type[LaunchConfig], self.launcher.load().Config), config.launch, "launch")
        return config

    @property
    def workload(self) -> str:
        return next(p.name for p in self.plugins if p.kind == "workload")

    @property
    def opts(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.plugins if p.kind == "opt")

    def settings(self) -> dict[str, Any]:
        """The part of the configuration that decides the numbers."""
        return {key: value for key, value in self.config.items() if key not in RUN_KEYS}

    def hash(self) -> str:
        """SHA-256 over all that decides the numbers: settings, mesh, core's code and each plugin's."""
        decisive = (self.settings(), self.plugins, self.world_size, self.dimensions, core_hash())
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=_plain).encode()).hexdigest()

    def save(self, path: Path) -> None:
        OmegaConf.save(OmegaConf.create({"schema": PLAN_SCHEMA, "plan_hash": self.hash(), **asdict(self)}), path)

    @staticmethod
    def load(path: Path) -> RunPlan:
        data = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path), resolve=False))
        if data.pop("schema") != PLAN_SCHEMA:
            raise UsageError(f"{path} was written by another version of timetrial; start the run again")
        del data["plan_hash"]
        for key in ("plugins", "trackers"):
            data[key] = [Installed(**plugin) for plugin in data[key]]
        data["launcher"] = Installed(**data["launcher"])
        data["dimensions"] = tuple(Dimension(**dimension) for dimension in data["dimensions"])
        return RunPlan(**data)


@cache
def core_hash() -> str:
    """SHA-256 over core's own code, the conformance kit aside."""
    folder = Path(core.__file__).parent
    return source_hash(folder, without=folder / "testing")


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Installed | Dimension) else str(value)


def new_run_name(what: str) -> str:
    """<date>-<time>-<what>-<id>: unique even for two runs that start in the same second."""
    return f"{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}-{what}-{secrets.token_hex(3)}"
