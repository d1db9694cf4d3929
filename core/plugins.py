"""`timetrial plugins`: what is installed, what each plugin requires, and whether this machine can run it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from core.api.errors import PluginError, exit_status
from core.api.tables import print_table
from core.api.types import BackendSpec, Command, Devices, PluginSpec
from core.compose.discovery import Installed, discover
from core.compose.resolve import capabilities


@dataclass(kw_only=True)
class NoSettings:
    """It has none."""


class Plugins(Command):
    """Lists the installed plugins. It imports each of them, without torch."""

    spec = PluginSpec(interface=2, summary="list the installed plugins and whether they can run here")
    Config = NoSettings

    def run(self, arguments: list[str]) -> int:
        argparse.ArgumentParser("timetrial plugins", description=self.spec.summary).parse_args(arguments)
        specs: dict[Installed, PluginSpec | PluginError] = {}
        for plugin in discover().plugins:
            try:
                specs[plugin] = plugin.load().spec
            except PluginError as error:
                specs[plugin] = error
        probes = {plugin: spec.probe() for plugin, spec in specs.items() if isinstance(spec, BackendSpec)}
        offered = capabilities(*probes.values(), multi_rank=True, multi_node=True)
        headings = ("kind", "name", "version", "distribution", "summary", "requires", "runs here")
        rows = [
            (p.kind, p.name, p.version, p.distribution, *_verdict(s, probes.get(p), offered)) for p, s in specs.items()
        ]
        print_table(headings, rows, 200)
        return 0


def _verdict(spec: PluginSpec | PluginError, devices: Devices | None, offered: set[str]) -> tuple[str, str, str]:
    """Summary, requirements, and "yes" or the reason why the plugin cannot run here."""
    if isinstance(spec, PluginError):
        return "", "", f"no: {spec}"
    missing = ", ".join(sorted(spec.requires - offered))
    problem = f"no installed backend provides {missing} on this machine" if missing else devices and devices.problem
    return spec.summary, ", ".join(sorted(spec.requires)), f"no: {problem}" if problem else "yes"


def main() -> int:
    """The entry point of `python -m core.plugins`. Returns the exit status."""
    return exit_status(lambda: Plugins(NoSettings()).run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
