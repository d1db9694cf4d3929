"""A composed configuration and the installed plugins become one ordered, checked `RunPlan`, or an error.

The plan is plain data: it is saved as resolved.yaml and is all that a worker process is given.
"""

from __future__ import annotations

import graphlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import pluggy
from omegaconf import DictConfig, OmegaConf

from core import __version__
from core.config import RunConfig, parse_seed, validate
from core.discovery import Installed, Registry
from core.errors import PluginError, UsageError
from core.hookspecs import PROJECT, Hooks
from core.types import BackendSpec, Devices, Kind, OptSpec, Plugin

PLAN_SCHEMA = 1

# Keys that may differ between a run and its continuation: they change where and how long it runs, not what it computes.
RUN_KEYS = ("run_dir", "resume", "resume_changed", "score_restarts", "stop", "checkpoint", "log_seconds", "submission")


@dataclass(frozen=True)
class Chosen:
    """One plugin of a plan."""

    kind: Kind
    name: str
    target: str
    distribution: str
    version: str
    hash: str

    @property
    def node(self) -> str:
        """Where its part of the configuration lies."""
        return f"opt.{self.name}" if self.kind == "opt" else self.kind

    def load(self) -> type[Plugin]:
        return Installed(self.kind, self.name, self.target, self.distribution, self.version, Path()).load()


@dataclass(frozen=True)
class RunPlan:
    """What to run: the root configuration and the plugins (backend, workload, opts from innermost to outermost)."""

    config: dict[str, Any]
    """As composed, with interpolations kept, so that no secret from the environment is written to a file."""
    plugins: list[Chosen]
    seed: int
    world_size: int
    environment: dict[str, str]

    def root(self) -> RunConfig:
        return validate(RunConfig, OmegaConf.create(self.config), "")

    def build(self, chosen: Chosen) -> Plugin:
        """The plugin, constructed with its validated part of the configuration."""
        cls = chosen.load()
        return cls(validate(cls.Config, OmegaConf.select(OmegaConf.create(self.config), chosen.node), chosen.node))

    def of_kind(self, kind: Kind) -> list[Chosen]:
        return [p for p in self.plugins if p.kind == kind]

    @property
    def workload(self) -> str:
        return self.of_kind("workload")[0].name

    def hash(self) -> str:
        """SHA-256 over all that decides the numbers: configuration, world size, and each plugin's code."""
        config = {k: v for k, v in self.config.items() if k not in RUN_KEYS}
        plugins = [asdict(p) for p in self.plugins]
        text = json.dumps([config, plugins, self.world_size, __version__], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: Path) -> None:
        OmegaConf.save(OmegaConf.create({"schema": PLAN_SCHEMA, "plan_hash": self.hash(), **asdict(self)}), path)

    @staticmethod
    def load(path: Path) -> RunPlan:
        data = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path), resolve=False))
        if data["schema"] != PLAN_SCHEMA:
            raise UsageError(f"{path} was written by another version of timetrial; start the run again")
        plugins = [Chosen(**p) for p in data["plugins"]]
        return RunPlan(data["config"], plugins, data["seed"], data["world_size"], data["environment"])


@dataclass(frozen=True)
class Attempt:
    """This start of a run: where it writes, and what it continues."""

    run_dir: str
    resume_from: str | None = None
    """Run folder whose newest checkpoint is the start; None begins anew."""
    restarts: int = 0
    changed: bool = False
    """Whether configuration, code or world size differ from the run that it continues."""


def resolve(config: DictConfig, choices: Mapping[str, Any], registry: Registry) -> RunPlan:
    """Checks everything that can be checked before a process starts. Raises UsageError or PluginError.

    `choices` are Hydra's: the option chosen in each group. The order of opts on the command line does not matter.
    """
    root = validate(RunConfig, config, "")
    raw = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    world_size = int(os.environ.get("WORLD_SIZE", root.launch.nproc))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", root.launch.nproc))

    workload = registry.find("workload", str(choices["workload"]))
    backend, devices = _backend(str(choices["backend"]), registry, world_size, local_ranks)
    if choices["backend"] == "auto":
        if raw["backend"]:
            raise UsageError(f"settings of a backend need its name: backend={backend.name} backend.…")
        raw["backend"] = OmegaConf.to_container(OmegaConf.load(backend.conf_dir / "backend" / f"{backend.name}.yaml"))

    opts = {name: registry.find("opt", name) for name in sorted(root.opt)}
    specs = {name: cast(OptSpec, opt.load().spec) for name, opt in opts.items()}
    offered = set(devices.provides) | ({"multi_rank"} if world_size > 1 else set())
    offered |= {"multi_node"} if world_size > local_ranks else set()
    offered |= {"cxx"} if any(map(shutil.which, ("c++", "g++", "clang++"))) else set()
    check_composition(specs, offered, backend.name)

    plugins = [
        Chosen(p.kind, p.name, p.target, p.distribution, p.version, p.source_hash())
        for p in (backend, workload, *(opts[name] for name in nesting(specs)))
    ]
    seed = parse_seed(root.seed)
    seed = time.time_ns() if seed is None else seed
    plan = RunPlan(raw, plugins, seed, world_size, {})
    plan.environment.update(_environment(plan))
    return plan


def check_composition(specs: Mapping[str, OptSpec], offered: set[str], backend: str) -> None:
    """Unmet requirements, conflicts and doubly claimed resources of the chosen opts."""
    for name, spec in specs.items():
        missing = sorted(spec.requires - offered)
        if missing:
            raise UsageError(f"opt '{name}' requires {', '.join(missing)}: {_remedy(missing[0], backend)}")
    for first, second in combinations(sorted(specs), 2):
        for one, other in ((first, second), (second, first)):
            if other in specs[one].conflicts:
                raise UsageError(f"opts '{one}' and '{other}' conflict: {specs[one].conflicts[other]}; leave one out")
        shared = sorted(specs[first].claims & specs[second].claims)
        if shared:
            raise UsageError(f"opts '{first}' and '{second}' both claim {', '.join(shared)}; leave one out")


def nesting(specs: Mapping[str, OptSpec]) -> list[str]:
    """The opts from innermost to outermost; a function of the set, not of the order on the command line."""
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for name in sorted(specs):
        sorter.add(name, *sorted(specs[name].wraps & specs.keys()))
    try:
        return list(sorter.static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(error.args[1])
        raise PluginError(f"opts that each want to wrap the other: {circle}; leave one out") from None


def _remedy(requirement: str, backend: str) -> str:
    known = {
        "multi_rank": "start more ranks, such as launch.nproc=2",
        "multi_node": "start it on several nodes, as with torchrun --nnodes=2",
        "cxx": "install a C++ compiler, such as g++",
    }
    return known.get(requirement, f"backend={backend} does not provide it here; see `python -m core.plugins`")


def _backend(name: str, registry: Registry, world_size: int, local_ranks: int) -> tuple[Installed, Devices]:
    """The backend of that name, or for `auto` the preferred one of those that can run here."""
    able: list[tuple[int, Installed, Devices]] = []
    names = registry.names("backend") if name == "auto" else [registry.find("backend", name).name]
    for backend in (registry.find("backend", n) for n in names):
        try:
            spec = cast(BackendSpec, backend.load().spec)
            devices = spec.probe()
            _check_backend(backend.name, spec, devices, world_size, local_ranks)
            able.append((spec.preference, backend, devices))
        except UsageError:  # with `auto`, one that is broken or cannot run here is passed over
            if name != "auto":
                raise
    if not able:
        raise UsageError(f"no installed backend can run {world_size} ranks here: see `python -m core.plugins`")
    return max(able, key=lambda candidate: candidate[0])[1:]


def _check_backend(name: str, spec: BackendSpec, devices: Devices, world_size: int, local_ranks: int) -> None:
    if devices.problem:
        raise UsageError(f"backend={name} cannot run here: {devices.problem}")
    if spec.max_ranks is not None and world_size > spec.max_ranks:
        raise UsageError(f"backend={name} serves {spec.max_ranks} rank, not {world_size}: use backend=auto")
    if devices.count is not None and local_ranks > devices.count:
        raise UsageError(
            f"backend={name} finds {devices.count} devices for {local_ranks} ranks: use launch.nproc={devices.count}"
        )


def _environment(plan: RunPlan) -> dict[str, str]:
    """The union of the plugins' environment variables; two values for one name is an error."""
    manager, root, merged = plugin_manager(plan), plan.root(), dict[str, tuple[str, str]]()
    for name, plugin in manager.list_name_plugin():
        hook = getattr(plugin, "environment", None)
        for key, value in (hook(config=root) if hook else {}).items():
            other, old = merged.setdefault(key, (name, value))
            if old != value:
                raise UsageError(f"{other} sets {key}={old}, but {name} sets {key}={value}; leave one out")
    return {key: value for key, (_, value) in merged.items()}


def plugin_manager(plan: RunPlan, defaults: Sequence[object] = ()) -> pluggy.PluginManager:
    """The plan's plugins, constructed and registered: `defaults` first, so that they are innermost, then opts outwards.

    A hook that does not exist, or an argument that it does not have, is refused here.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    for default in defaults:
        manager.register(default)
    for chosen in plan.plugins:
        try:
            manager.register(plan.build(chosen), name=f"{chosen.kind} {chosen.name}")
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            who = f"{chosen.kind} '{chosen.name}' (distribution {chosen.distribution})"
            raise PluginError(f"{who} does not fit the interface: {error}") from None
    return manager
