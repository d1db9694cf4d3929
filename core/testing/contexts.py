"""One rank without a run around it, for tests that call the parts of a plugin: there is no process group, and what the
other ranks answer is made up."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pluggy import PluginManager

from core.api.config import RunConfig, validate
from core.api.hooks import PROJECT, Hooks
from core.api.mesh import Mesh, arrange
from core.api.preparation import Preparation
from core.api.types import RunContext
from core.compose.composition import compose
from core.compose.discovery import discover
from core.compose.manager import plugin_manager
from core.engine.build import Baseline


@dataclass
class OneRank:
    """The backend of a rank that is alone in its process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    others: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    """What other ranks answer in `all_gather`; zeros from those that are not named."""
    said: list[float] = field(default_factory=list[float])
    """What this rank gave to the last `all_gather`."""

    def all_gather(self, values: list[float]) -> list[list[float]]:
        self.said = values
        silence = [0.0] * len(values)
        return [values if rank == self.rank else self.others.get(rank, silence) for rank in range(self.world_size)]

    def broadcast(self, value: Any) -> Any:
        return value

    def synchronize(self) -> None:
        """Nothing is queued."""

    def shutdown(self) -> None:
        """Nothing is open."""


def lone_context(
    run_dir: Path, *overrides: str, rank: int = 0, world: int = 1, device: str = "cpu", seed: int = 1
) -> RunContext:
    """The context of data rank `rank` of `world`, configured by a command line. No opt replaces a seam, and `feed`
    moves nothing."""
    config = validate(RunConfig, _composed(overrides)[0], "")
    ctx = RunContext(config=config, run_dir=run_dir, seed=seed)
    ctx.backend = OneRank(rank, world, torch.device(device))
    ctx.mesh = Mesh(arrange((), world), rank)
    ctx.offers = lambda seam, default: default
    ctx.feed = iter
    return ctx


def lone_workload(run_dir: Path, option: str, *overrides: str, **place: Any) -> Any:
    """The workload of that option, built as on a rank of `lone_context`; `overrides` are keys of `workload`. Of the
    keywords, those of DataConfig are settings of `data`; nothing is read by other processes or threads."""
    data = {"workers": 0} | {key: place.pop(key) for key in ("source", "root", "max_bad", "workers") if key in place}
    settings = [f"data.{key}={'null' if value is None else value}" for key, value in data.items()]
    arguments = (f"workload={option}", *(f"workload.{override}" for override in overrides), *settings)
    ctx = lone_context(run_dir, *arguments, **place)
    plugin = discover().find("workload", option)
    ctx.workload = plugin_manager([plugin], _composed(arguments)[0]).hook.make_workload(ctx=ctx)
    return ctx.workload


def settings_that_are_prepared_with(source: Path, out: Path, option: str, *overrides: str) -> set[str]:
    """Prepares `source` into `out` in this process. Returns the keys of `workload` that were looked at."""

    class Watched:
        def __getattr__(self, key: str) -> Any:
            read.add(key)
            return getattr(settings, key)

    read = set[str]()
    arguments = (f"workload={option}", "data.workers=0", *(f"workload.{override}" for override in overrides))
    composed, _ = _composed(arguments)
    manager = plugin_manager([discover().find("workload", option)], composed)
    (plugin,) = manager.get_plugins()
    settings, plugin.config = plugin.config, Watched()
    manager.hook.prepare(preparation=Preparation(source, out, validate(RunConfig, composed, "")))
    return read


def hooks_of(*plugins: object) -> Any:
    """The hooks of these plugins, the innermost first, around core's own."""
    manager = PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    for plugin in (Baseline(), *plugins):
        manager.register(plugin)
    return manager.hook


@functools.cache
def _composed(overrides: tuple[str, ...]) -> tuple[Any, Any]:
    return compose(list(overrides), discover())
