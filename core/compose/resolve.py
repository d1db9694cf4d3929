"""A composed configuration and the installed plugins become one ordered, checked `RunPlan`, or an error."""

from __future__ import annotations

import graphlib
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from core.api.config import LaunchConfig, RunConfig, validate
from core.api.errors import ConflictError, NotHereError, PluginError, UsageError
from core.api.mesh import Dimension, arrange
from core.api.types import BackendSpec, Devices, Launcher, OptSpec, Ranks
from core.compose.discovery import Installed, Registry
from core.compose.manager import plugin_manager
from core.compose.plan import RunPlan

EXCHANGE = "gradient_exchange"
_REMEDIES = {
    "multi_rank": "start more ranks, such as launch.nproc=2",
    "multi_node": "start it on several nodes, as with torchrun --nnodes=2",
    "cxx": "install a C++ compiler, such as g++",
}


def resolve(config: DictConfig, choices: Mapping[str, Any], registry: Registry) -> RunPlan:
    """Checks everything that can be checked before a process starts, and raises UsageError or one of its kinds.
    `choices` are Hydra's: the option chosen in each group. The order of opts on the command line does not matter."""
    root = validate(RunConfig, config, "")
    raw = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    launcher = registry.find("launcher", str(choices["launch"]))
    ranks = _ranks(launcher, root)
    workload = registry.find("workload", str(choices["workload"]))
    backend, devices = _backend(str(choices["backend"]), registry, ranks.per_node)
    if choices["backend"] == "auto":
        if raw["backend"]:
            raise UsageError(f"settings of a backend need its name: backend={backend.name} backend.…")
        raw["backend"] = _settings(backend)
    chosen = {name: registry.find("opt", name) for name in root.opt}
    dimensions = _mesh(chosen.values(), raw, root, ranks)
    exchange = _default_exchange(chosen, dimensions, root, registry)
    if exchange is not None:
        chosen[exchange.name] = exchange
        raw["opt"][exchange.name] = _settings(exchange)
    offered = capabilities(devices, multi_rank=ranks.world_size > 1, multi_node=ranks.world_size > ranks.per_node)
    for plugin in (workload, *chosen.values()):
        _require(plugin, offered, backend.name)
    opts = [chosen[name] for name in _nesting({name: cast(OptSpec, opt.load().spec) for name, opt in chosen.items()})]
    plugins = [replace(plugin, hash=plugin.source_hash()) for plugin in (backend, *opts, workload)]
    plan = RunPlan(
        raw, plugins, _trackers(raw, root, registry), launcher, _seed(root), ranks.world_size, ranks.per_node,
        dimensions, {},
    )  # fmt: skip
    manager = plugin_manager([*plan.plugins, *plan.trackers], raw)
    plan = replace(plan, environment=environment(manager, root))
    manager.hook.check(plan=plan)
    return plan


def _ranks(launcher: Installed, root: RunConfig) -> Ranks:
    """How many processes there are: from an outer launcher, such as torchrun, or else from the chosen one."""
    cls = launcher.load()
    if not issubclass(cls, Launcher):
        raise PluginError(f"{launcher.who}: {launcher.target} is not a subclass of core.api.types.Launcher")
    ranks = cls(validate(cast(type[LaunchConfig], cls.Config), root.launch, "launch")).ranks()
    world_size = int(os.environ.get("WORLD_SIZE", ranks.world_size))
    return Ranks(world_size=world_size, per_node=int(os.environ.get("LOCAL_WORLD_SIZE", ranks.per_node)))


def _settings(plugin: Installed) -> Any:
    """Its configuration as its YAML has it, for a plugin that the command line does not name."""
    return OmegaConf.to_container(OmegaConf.load(plugin.conf_file))


def _mesh(opts: Iterable[Installed], raw: Mapping[str, Any], root: RunConfig, ranks: Ranks) -> tuple[Dimension, ...]:
    added = plugin_manager(opts, raw).hook.dimensions(config=root)
    return arrange((dimension for one in reversed(added) for dimension in one), ranks.world_size)


def _default_exchange(
    chosen: Mapping[str, Installed], dimensions: tuple[Dimension, ...], root: RunConfig, registry: Registry
) -> Installed | None:
    """The opt that averages gradients, where there are several data ranks and no chosen opt claims to do it."""
    several = any(d.splits_data and d.size != 1 for d in dimensions)
    claimed = any(EXCHANGE in cast(OptSpec, opt.load().spec).claims for opt in chosen.values())
    if not several or claimed or root.default_exchange is None:
        return None
    return registry.find("opt", root.default_exchange)


def _trackers(raw: dict[str, Any], root: RunConfig, registry: Registry) -> list[Installed]:
    """Those that were chosen and those that every run has, in order of name; completes their settings in `raw`."""
    for name in root.default_trackers:
        if name not in raw["tracker"]:
            raw["tracker"][name] = _settings(registry.find("tracker", name))
    found = [registry.find("tracker", name) for name in sorted(raw["tracker"])]
    return [replace(plugin, hash=plugin.source_hash()) for plugin in found]


def _seed(root: RunConfig) -> int:
    seed = time.time_ns() if root.seed == "clock" else root.seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UsageError(f"seed={seed}: an integer from 0 to 2^63-1 or `clock` is expected")
    return seed


def capabilities(*found: Devices, multi_rank: bool, multi_node: bool) -> set[str]:
    """What plugins may require here: all that these backends provide, and what holds whatever the backend."""
    compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
    rest = {"multi_rank": multi_rank, "multi_node": multi_node, "cxx": compiler}
    return {name for name, holds in rest.items() if holds}.union(*(d.provides for d in found if not d.problem))


def _require(plugin: Installed, offered: set[str], backend: str) -> None:
    missing = sorted(plugin.load().spec.requires - offered)
    if missing:
        elsewhere = f"backend={backend} does not provide it here; see `timetrial plugins`"
        what = f"{plugin.kind} '{plugin.name}' requires {', '.join(missing)}"
        raise NotHereError(f"{what}: {_REMEDIES.get(missing[0], elsewhere)}")


def _nesting(specs: Mapping[str, OptSpec]) -> list[str]:
    """The opts from innermost to outermost, a function of the set. ConflictError where two exclude each other."""
    for one, other in permutations(sorted(specs), 2):
        if other in specs[one].conflicts:
            raise ConflictError(f"opts '{one}' and '{other}' conflict: {specs[one].conflicts[other]}; leave one out")
    for one, other in combinations(sorted(specs), 2):  # afterwards: a declared conflict says more
        shared = sorted(specs[one].claims & specs[other].claims)
        if shared:
            raise ConflictError(f"opts '{one}' and '{other}' both claim {', '.join(shared)}; leave one out")
    inside = {name: sorted(spec.wraps & specs.keys()) for name, spec in sorted(specs.items())}
    try:
        return list(graphlib.TopologicalSorter(inside).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(error.args[1])
        raise PluginError(f"opts each declare that they wrap the other: {circle}; leave one out") from None


def _backend(name: str, registry: Registry, ranks: int) -> tuple[Installed, Devices]:
    """The backend of that name, or for `auto` the preferred one of those that can serve `ranks` ranks here."""
    able: list[tuple[int, Installed, Devices]] = []
    for backend in (registry.find("backend", n) for n in ([name] if name != "auto" else registry.names("backend"))):
        try:
            spec = cast(BackendSpec, backend.load().spec)
            devices = spec.probe()
            if devices.problem:
                raise NotHereError(f"backend={name} cannot run here: {devices.problem}")
            if devices.count is not None and ranks > devices.count:
                few = f"backend={name} can serve {devices.count} of {ranks} ranks here"
                raise NotHereError(f"{few}: use launch.nproc={devices.count} or another backend")
            able.append((spec.preference, backend, devices))
        except UsageError:  # `auto` skips one that is broken or cannot run here
            if name != "auto":
                raise
    if not able:
        raise NotHereError(f"no installed backend can run {ranks} ranks here: see `timetrial plugins`")
    return max(able, key=lambda candidate: candidate[0])[1:]


def environment(manager: Any, config: RunConfig) -> dict[str, str]:
    """The union of the plugins' environment variables; ConflictError for two values of one name."""
    merged: dict[str, tuple[str, str]] = {}
    for hook in manager.hook.environment.get_hookimpls():
        arguments = [config] if hook.argnames else []  # an implementation may leave it out
        for key, value in cast(dict[str, str], hook.function(*arguments)).items():
            old, owner = merged.setdefault(key, (value, hook.plugin_name))
            if old != value:
                both = f"{owner} sets {key}={old}, but {hook.plugin_name} sets {key}={value}"
                raise ConflictError(f"{both}; leave one out")
    return {key: value for key, (value, _) in merged.items()}
