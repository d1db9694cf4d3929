"""`python -m core.plugins`: what is installed, what each plugin requires, and whether this machine can run it."""

from __future__ import annotations

import shutil
import sys

from core.discovery import Installed, Registry, discover
from core.errors import TimetrialError
from core.types import BackendSpec, Devices, PluginSpec


def main() -> int:
    try:
        registry = discover()
    except TimetrialError as error:
        print(f"timetrial: {error}", file=sys.stderr)
        return error.exit_code
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "name", "version", "distribution", "summary", "requires", "runs here", box=box.SIMPLE)
    for plugin, spec, verdict in survey(registry):
        summary, requires = (spec.summary, ", ".join(sorted(spec.requires))) if spec else ("", "")
        table.add_row(plugin.kind, plugin.name, plugin.version, plugin.distribution, summary, requires, verdict)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def survey(registry: Registry) -> list[tuple[Installed, PluginSpec | None, str]]:
    """Each plugin with its spec (None where it cannot be imported) and "yes" or the reason why not."""
    specs: dict[tuple[str, str], PluginSpec | TimetrialError] = {}
    for plugin in registry.plugins:
        try:
            specs[plugin.kind, plugin.name] = plugin.load().spec
        except TimetrialError as error:
            specs[plugin.kind, plugin.name] = error
    probes = {name: s.probe() for (_, name), s in specs.items() if isinstance(s, BackendSpec)}
    offered = {"multi_rank", "multi_node"} | {c for d in probes.values() if not d.problem for c in d.provides}
    offered |= {"cxx"} if any(map(shutil.which, ("c++", "g++", "clang++"))) else set()
    return [_judge(plugin, specs[plugin.kind, plugin.name], probes, offered) for plugin in registry.plugins]


def _judge(
    plugin: Installed, spec: PluginSpec | TimetrialError, probes: dict[str, Devices], offered: set[str]
) -> tuple[Installed, PluginSpec | None, str]:
    if isinstance(spec, TimetrialError):
        return plugin, None, f"no: {spec}"
    problem = probes[plugin.name].problem if plugin.kind == "backend" else ""
    missing = sorted(spec.requires - offered)
    if missing:
        problem = f"no installed backend provides {', '.join(missing)} on this machine"
    return plugin, spec, f"no: {problem}" if problem else "yes"


if __name__ == "__main__":
    sys.exit(main())
