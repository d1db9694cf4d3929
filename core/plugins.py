"""`python -m core.plugins`: what is installed, what each plugin requires, and whether this machine can run it."""

import sys

from core.api.errors import PluginError, exit_status
from core.api.types import BackendSpec, Devices, PluginSpec
from core.compose.discovery import Installed, discover
from core.compose.resolve import capabilities
from core.state.report import print_table


def main() -> int:
    specs: dict[Installed, PluginSpec | PluginError] = {}
    for plugin in discover().plugins:
        try:
            specs[plugin] = plugin.load().spec
        except PluginError as error:
            specs[plugin] = error
    probes = {plugin: spec.probe() for plugin, spec in specs.items() if isinstance(spec, BackendSpec)}
    offered = capabilities(*probes.values(), multi_rank=True, multi_node=True)
    headings = ("kind", "name", "version", "distribution", "summary", "requires", "runs here")
    rows = [(p.kind, p.name, p.version, p.distribution, *_verdict(s, probes.get(p), offered)) for p, s in specs.items()]
    print_table(headings, rows, 200)
    return 0


def _verdict(spec: PluginSpec | PluginError, devices: Devices | None, offered: set[str]) -> tuple[str, str, str]:
    """Summary, requirements, and "yes" or the reason why the plugin cannot run here."""
    if isinstance(spec, PluginError):
        return "", "", f"no: {spec}"
    missing = ", ".join(sorted(spec.requires - offered))
    problem = f"no installed backend provides {missing} on this machine" if missing else devices and devices.problem
    return spec.summary, ", ".join(sorted(spec.requires)), f"no: {problem}" if problem else "yes"


if __name__ == "__main__":
    sys.exit(exit_status(main))
