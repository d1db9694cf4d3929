"""A composed configuration and the installed plugins become one ordered, checked `RunPlan`, or an error.

The plan is plain data: it is saved as resolved.yaml and is all that a worker process is given.
"""

import graphlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from pluggy import PluginManager, PluginValidationError

from core import __version__
from core.api.config import RunConfig, validate
from core.api.errors import PluginError, UsageError
from core.api.hooks import PROJECT, Hooks
from core.api.types import BackendSpec, Devices, OptSpec
from core.compose.discovery import Installed, Registry

PLAN_SCHEMA = 2

# Keys that may differ between a run and its continuation: they change where and how long it runs, not what it computes.
RUN_KEYS = ("run_dir", "resume", "resume_changed", "score_restarts", "stop", "checkpoint", "log_seconds", "submission")
_REMEDIES = {
    "multi_rank": "start more ranks, such as launch.nproc=2",
    "multi_node": "start it on several nodes, as with torchrun --nnodes=2",
    "cxx": "install a C++ compiler, such as g++",
}


@dataclass(frozen=True)
class RunPlan:
    """What to run: the root configuration and the plugins (backend, workload, opts from innermost to outermost)."""

    config: dict[str, Any]
    """As composed, with interpolations kept, so that no secret from the environment is written to a file."""
    plugins: list[Installed]
    seed: int
    world_size: int
    environment: dict[str, str]
    run_dir: str = ""
    """Where this start of the run writes; empty on the other ranks of an outer launcher, which rank 0 tells."""
    resume_from: str | None = None  # run folder whose newest checkpoint is the start; None begins anew
    restarts: int = 0
    changed: bool = False  # whether configuration, code or world size differ from the run that it continues

    def root(self) -> RunConfig:
        return validate(RunConfig, OmegaConf.create(self.config), "")

    @property
    def workload(self) -> str:
        return next(p.name for p in self.plugins if p.kind == "workload")

    def settings(self) -> dict[str, Any]:
        """The part of the configuration that decides the numbers."""
        return {key: value for key, value in self.config.items() if key not in RUN_KEYS}

    def hash(self) -> str:
        """SHA-256 over all that decides the numbers: settings, world size, and each plugin's code."""
        plugins = [asdict(p) for p in self.plugins]
        text = json.dumps([self.settings(), plugins, self.world_size, __version__], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: Path) -> None:
        OmegaConf.save(OmegaConf.create({"schema": PLAN_SCHEMA, "plan_hash": self.hash(), **asdict(self)}), path)

    @staticmethod
    def load(path: Path) -> "RunPlan":
        data = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path), resolve=False))
        if data.pop("schema") != PLAN_SCHEMA:
            raise UsageError(f"{path} was written by another version of timetrial; start the run again")
        del data["plan_hash"]
        data["plugins"] = [Installed(**plugin) for plugin in data["plugins"]]
        return RunPlan(**data)


def resolve(config: DictConfig, choices: Mapping[str, Any], registry: Registry) -> RunPlan:
    """Checks everything that can be checked before a process starts, and raises UsageError or PluginError. `choices`
    are Hydra's: the option chosen in each group. The order of opts on the command line does not matter."""
    root = validate(RunConfig, config, "")
    raw = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    world_size = int(os.environ.get("WORLD_SIZE", root.launch.nproc))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", root.launch.nproc))
    workload = registry.find("workload", str(choices["workload"]))
    backend, devices = _backend(str(choices["backend"]), registry, local_ranks)
    if choices["backend"] == "auto":
        if raw["backend"]:
            raise UsageError(f"settings of a backend need its name: backend={backend.name} backend.…")
        raw["backend"] = OmegaConf.to_container(OmegaConf.load(backend.conf_dir / "backend" / f"{backend.name}.yaml"))
    opts = {name: registry.find("opt", name) for name in root.opt}
    specs = {name: cast(OptSpec, opt.load().spec) for name, opt in opts.items()}
    offered = capabilities(devices, multi_rank=world_size > 1, multi_node=world_size > local_ranks)
    for plugin in (workload, *opts.values()):
        missing = sorted(plugin.load().spec.requires - offered)
        if missing:
            elsewhere = f"backend={backend.name} does not provide it here; see `python -m core.plugins`"
            what = f"{plugin.kind} '{plugin.name}' requires {', '.join(missing)}"
            raise UsageError(f"{what}: {_REMEDIES.get(missing[0], elsewhere)}")
    chosen = (backend, workload, *(opts[name] for name in _nesting(specs)))
    plugins = [replace(plugin, hash=plugin.source_hash()) for plugin in chosen]
    seed = time.time_ns() if root.seed == "clock" else root.seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UsageError(f"seed={seed}: an integer from 0 to 2^63-1 or `clock` is expected")
    manager = plugin_manager(plugins, raw)
    manager.hook.check(plan=SimpleNamespace(root=root))
    return RunPlan(raw, plugins, seed, world_size, environment(manager, root))


def capabilities(*found: Devices, multi_rank: bool, multi_node: bool) -> set[str]:
    """What plugins may require here: all that these backends provide, and what holds whatever the backend."""
    compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
    rest = {"multi_rank": multi_rank, "multi_node": multi_node, "cxx": compiler}
    return {name for name, holds in rest.items() if holds}.union(*(d.provides for d in found if not d.problem))


def _nesting(specs: Mapping[str, OptSpec]) -> list[str]:
    """The opts from innermost to outermost, a function of the set. UsageError where two conflict or claim the same."""
    for one, other in permutations(sorted(specs), 2):
        if other in specs[one].conflicts:
            raise UsageError(f"opts '{one}' and '{other}' conflict: {specs[one].conflicts[other]}; leave one out")
        shared = sorted(specs[one].claims & specs[other].claims)
        if shared:
            raise UsageError(f"opts '{one}' and '{other}' both claim {', '.join(shared)}; leave one out")
    inside = {name: sorted(spec.wraps & specs.keys()) for name, spec in sorted(specs.items())}
    try:
        return list(graphlib.TopologicalSorter(inside).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(error.args[1])
        raise PluginError(f"opts that each want to wrap the other: {circle}; leave one out") from None


def _backend(name: str, registry: Registry, ranks: int) -> tuple[Installed, Devices]:
    """The backend of that name, or for `auto` the preferred one of those that can serve so many ranks here."""
    able: list[tuple[int, Installed, Devices]] = []
    for backend in (registry.find("backend", n) for n in ([name] if name != "auto" else registry.names("backend"))):
        try:
            spec = cast(BackendSpec, backend.load().spec)
            devices = spec.probe()
            if devices.problem:
                raise UsageError(f"backend={name} cannot run here: {devices.problem}")
            if devices.count is not None and ranks > devices.count:
                few = f"backend={name} can serve {devices.count} of {ranks} ranks here"
                raise UsageError(f"{few}: use launch.nproc={devices.count} or another backend")
            able.append((spec.preference, backend, devices))
        except UsageError:  # `auto` passes over one that is broken or cannot run here
            if name != "auto":
                raise
    if not able:
        raise UsageError(f"no installed backend can run {ranks} ranks here: see `python -m core.plugins`")
    return max(able, key=lambda candidate: candidate[0])[1:]


def plugin_manager(plugins: Iterable[Installed], config: Any, innermost: Iterable[object] = ()) -> PluginManager:
    """The plugins, constructed from their parts of the root `config` and registered: core's `innermost` first, then the
    opts outwards. A hook that does not exist, or an argument that it does not have, is refused here."""
    manager, whole = PluginManager(PROJECT), OmegaConf.create(config)
    manager.add_hookspecs(Hooks)
    for default in innermost:
        manager.register(default)
    for chosen in plugins:
        cls, node = chosen.load(), f"opt.{chosen.name}" if chosen.kind == "opt" else chosen.kind
        plugin = cls(validate(cls.Config, OmegaConf.select(whole, node), node))
        try:
            manager.register(plugin, name=f"{chosen.kind} {chosen.name}")
            manager.check_pending()
        except PluginValidationError as error:
            who = f"{chosen.kind} '{chosen.name}' (distribution {chosen.distribution})"
            raise PluginError(f"{who} does not fit the interface: {error}") from None
    return manager


def environment(manager: PluginManager, config: RunConfig) -> dict[str, str]:
    """The union of the plugins' environment variables; two values for one name is an error."""
    merged: dict[str, tuple[str, str]] = {}
    for hook in manager.hook.environment.get_hookimpls():
        arguments = [config] if hook.argnames else []  # an implementation may leave it out
        for key, value in cast(dict[str, str], hook.function(*arguments)).items():
            old, owner = merged.setdefault(key, (value, hook.plugin_name))
            if old != value:
                raise UsageError(f"{owner} sets {key}={old}, but {hook.plugin_name} sets {key}={value}; leave one out")
    return {key: value for key, (value, _) in merged.items()}
