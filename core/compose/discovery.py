"""Installed plugins, from package metadata alone: nothing is imported until a plugin is chosen.

A plugin is an entry point in the group `timetrial.<kind>`; its name is the name of the configuration option, which is
in the plugin's package as `conf/<group>/<name>.yaml`. The group is the kind, but "launch" for launchers; commands have
none. Several options may share one plugin class.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import get_args

from core import INTERFACE
from core.api.errors import PluginError, nearest
from core.api.types import Kind, Plugin

KINDS: tuple[Kind, ...] = get_args(Kind)
GROUPS: dict[Kind, str] = {kind: "launch" if kind == "launcher" else kind for kind in KINDS if kind != "command"}
"""Kind of plugin -> configuration group on the command line."""


@dataclass(frozen=True)
class Installed:
    """One option that an installed distribution offers, as its metadata describes it."""

    kind: Kind
    name: str
    target: str  # `module:Class` of the plugin
    distribution: str
    version: str
    hash: str = ""  # `source_hash`, once the plugin is part of a plan

    @cached_property
    def package_dir(self) -> Path:
        """The folder of the package that holds `target`, found without importing it."""
        module = self.target.partition(":")[0].split(".")
        top, *rest = module[:-1] or module
        spec = importlib.util.find_spec(top)
        if spec is None or not spec.submodule_search_locations:
            return Path("/nonexistent") / top  # a broken installation: `load` says so if it is chosen
        return Path(next(iter(spec.submodule_search_locations)), *rest)

    @property
    def conf_dir(self) -> Path:
        return self.package_dir / "conf"

    @property
    def conf_file(self) -> Path:
        """The YAML of this option."""
        return self.conf_dir / GROUPS[self.kind] / f"{self.name}.yaml"

    @property
    def who(self) -> str:
        """For messages."""
        return f"{self.kind} '{self.name}' (distribution {self.distribution} {self.version})"

    def load(self) -> type[Plugin]:
        """Imports the plugin's class. PluginError if that fails, or if it was built for another interface."""
        who = self.who
        try:
            plugin = metadata.EntryPoint(self.name, self.target, f"timetrial.{self.kind}").load()
        except Exception as error:
            raise PluginError(f"{who} cannot be imported, reinstall it: {type(error).__name__}: {error}") from error
        if not (isinstance(plugin, type) and issubclass(plugin, Plugin)):
            raise PluginError(f"{who}: {self.target} is not a subclass of core.api.types.Plugin")
        if plugin.spec.interface != INTERFACE:
            built = f"{who} was built for interface {plugin.spec.interface}, but this core has interface {INTERFACE}"
            raise PluginError(f"{built}: install releases that fit, or port it as core/api/MIGRATION.md describes")
        return plugin

    def source_hash(self) -> str:
        """SHA-256 over the package's Python and YAML files: what code a result came from."""
        return source_hash(self.package_dir)


def source_hash(folder: Path, without: Path | None = None) -> str:
    """SHA-256 over the names and contents of the Python and YAML files in `folder`, those in `without` left out."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".yaml") and without not in p.parents):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Registry:
    """The installed plugins, less those the user blocked."""

    def __init__(self, installed: Iterable[Installed], blocked: Iterable[str] = ()) -> None:
        self.blocked = frozenset(blocked)
        allowed = (plugin for plugin in installed if plugin.name not in self.blocked)
        self.plugins = sorted(allowed, key=lambda plugin: (KINDS.index(plugin.kind), plugin.name))
        owners: dict[str, Installed] = {}  # Hydra and pluggy would let one silently shadow the other
        for plugin in self.plugins:
            files = sorted(path.relative_to(plugin.conf_dir) for path in plugin.conf_dir.rglob("*.yaml"))
            for claim in (f"{plugin.kind} '{plugin.name}'", *(f"the configuration file {file}" for file in files)):
                other = owners.setdefault(claim, plugin)
                if other.package_dir != plugin.package_dir:
                    both = f"{other.distribution} and {plugin.distribution}"
                    raise PluginError(f"{claim} is shipped by both {both}: uninstall one of them")

    def names(self, kind: str) -> list[str]:
        return [p.name for p in self.plugins if p.kind == kind]

    def find(self, kind: Kind, name: str) -> Installed:
        for plugin in self.plugins:
            if (plugin.kind, plugin.name) == (kind, name):
                return plugin
        reason = "is blocked by --no-plugin" if name in self.blocked else "is not installed"
        raise PluginError(f"{kind} '{name}' {reason}: {nearest(name, self.names(kind))}")


def discover(blocked: Iterable[str] = (), allowed: Iterable[str] | None = None) -> Registry:
    """Every installed plugin, or only those in `allowed` and core's own, less those in `blocked`."""
    found: dict[tuple[str, str, str], Installed] = {}
    points = metadata.entry_points()
    for kind in KINDS:
        for point in points.select(group=f"timetrial.{kind}"):
            if point.dist is not None and (allowed is None or point.name in allowed or point.dist.name == "timetrial"):
                about = point.dist.metadata  # parsed anew each time that it is asked for
                distribution = re.sub(r"[-_.]+", "-", about["Name"]).lower()
                plugin = Installed(kind, point.name, point.value, distribution, about["Version"])
                # One distribution can be seen twice, as an editable install and as a folder on sys.path.
                found.setdefault((kind, point.name, distribution), plugin)
    return Registry(found.values(), blocked)
