"""Chosen plugins become objects with their configuration, registered with pluggy in the order of nesting."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf
from pluggy import PluginManager, PluginValidationError

from core.api.config import validate
from core.api.errors import PluginError
from core.api.hooks import PROJECT, Hooks
from core.compose.discovery import GROUPS, Installed

_OF_TRACKERS = frozenset({"environment", "check"})
"""Hooks that a tracker may implement besides those that only tell it what happens."""


def plugin_manager(plugins: Iterable[Installed], config: Any, innermost: Iterable[object] = ()) -> PluginManager:
    """The plugins, constructed from their parts of the root `config` and registered: core's `innermost` first, then the
    others outwards. A hook that does not exist, or an argument that it does not have, is refused here."""
    manager, whole = PluginManager(PROJECT), OmegaConf.create(config)
    manager.add_hookspecs(Hooks)
    for default in innermost:
        manager.register(default)
    for chosen in plugins:
        group = GROUPS[chosen.kind]
        cls, node = chosen.load(), f"{group}.{chosen.name}" if chosen.kind in ("opt", "tracker") else group
        plugin = cls(validate(cls.Config, OmegaConf.select(whole, node), node))
        try:
            manager.register(plugin, name=f"{chosen.kind} {chosen.name}")
            manager.check_pending()
        except PluginValidationError as error:
            raise PluginError(f"{chosen.who} does not fit the interface: {error}{_nearest_hook(error)}") from None
        if chosen.kind == "tracker":
            _refuse_more_than_telling(manager, plugin, chosen)
    return manager


def _refuse_more_than_telling(manager: PluginManager, plugin: object, chosen: Installed) -> None:
    hooks = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
    building = sorted(name for name in hooks - _OF_TRACKERS if not name.startswith("on_"))
    if building:
        what = f"{chosen.who} implements {', '.join(building)}, which changes a run"
        raise PluginError(f"{what}: a tracker is only told what happens; make it an opt")


def _nearest_hook(error: PluginValidationError) -> str:
    """A suggestion for a hook whose name is misspelt."""
    words = str(error).replace("'", " ").split()
    known = [name for name in vars(Hooks) if not name.startswith("_")]
    for word in words:
        close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
        if close and close[0] != word:
            return f" (did you mean '{close[0]}'?)"
    return ""
