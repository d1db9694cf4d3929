"""Old names of configuration keys: for one release, the error for an old name gives the new one.

A `Config` lists its own in `RENAMED`. `core.api.config.validate` meets an old key that a file holds or that was added
with `+`; others are refused before, by Hydra, which knows no schema. Here such a key is looked for in the overrides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core.api.config import RunConfig, renamed
from core.api.errors import PluginError
from core.api.types import Kind
from core.compose.discovery import GROUPS, Registry


def old_key(overrides: Iterable[str], registry: Registry, conf: Path) -> str | None:
    """The refusal of the first override whose key has been renamed, if there is one. `conf` is core's configuration."""
    pairs = [(key, value) for key, _, value in (override.lstrip("+~").partition("=") for override in overrides)]
    for key, _ in pairs:
        for schema, where in _schemas(key, dict(pairs), registry, conf):
            refusal = renamed(schema, key.removeprefix(f"{where}."), where)
            if refusal:
                return refusal
    return None


def _schemas(key: str, given: dict[str, str], registry: Registry, conf: Path) -> Iterator[tuple[type[Any], str]]:
    """The `Config` that holds `key`, and its place; several in a sweep over a group's options."""
    group, _, rest = key.partition(".")
    kinds: list[Kind] = [kind for kind, its_group in GROUPS.items() if its_group == group]
    if not kinds:
        yield RunConfig, ""
        return
    kind, name, several = kinds[0], rest.partition(".")[0], group in ("opt", "tracker")
    for option in [name] if several else _chosen(group, given, conf):
        with suppress(PluginError):  # one that is not installed is refused elsewhere
            yield registry.find(kind, option).load().Config, f"{group}.{name}" if several else group


def _chosen(group: str, given: dict[str, str], conf: Path) -> list[str]:
    """The options of a group: those on the command line, else the experiment's, else the default."""
    if group in given:
        return given[group].split(",")
    chosen: list[str] = []
    for file in (conf / "config.yaml", conf / "experiment" / f"{given.get('experiment')}.yaml"):
        for entry in OmegaConf.select(OmegaConf.load(file), "defaults") or () if file.is_file() else ():
            for name, option in entry.items() if isinstance(entry, DictConfig) else ():
                if str(name).removeprefix("override ").lstrip("/") == group:
                    chosen = [str(option)]
    return chosen
