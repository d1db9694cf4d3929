"""`timetrial COMMAND ...`, or `python -m core`: the single entry point.

`run` and `prepare` are core's own; the others come from installed distributions (entry points in the group
`timetrial.command`). Without a command's name, as in `timetrial workload=bert`, it is `run`.
"""

from __future__ import annotations

import sys

from core import __version__, prepare, run
from core.api.errors import PluginError, UsageError, exit_status, nearest
from core.api.types import Command
from core.compose.discovery import Registry, discover

OWN = {"run": "train a workload to its target (the default)", "prepare": "turn raw data into what a workload reads"}


def main() -> int:
    """The entry point of the console script `timetrial`. Returns the exit status."""
    word, *rest = sys.argv[1:] or ["run"]
    if word in OWN:
        sys.argv[1:] = rest
        return (run if word == "run" else prepare).main()
    if (word.startswith("-") and word not in ("-h", "--help")) or "=" in word:
        return run.main()
    return exit_status(lambda: _command(word, rest, discover()))


def _command(word: str, arguments: list[str], registry: Registry) -> int:
    if word in ("-h", "--help"):
        print(_help(registry))
        return 0
    if word not in registry.names("command"):
        known = [*OWN, *registry.names("command")]
        raise UsageError(f"'{word}' is not a command: {nearest(word, known)}; `timetrial --help` lists them")
    plugin = registry.find("command", word)
    cls = plugin.load()
    if not issubclass(cls, Command):
        raise PluginError(f"{plugin.who}: {plugin.target} is not a subclass of core.api.types.Command")
    return cls(cls.Config()).run(arguments)


def _help(registry: Registry) -> str:
    commands = dict(OWN)
    for plugin in (p for p in registry.plugins if p.kind == "command"):
        try:
            commands[plugin.name] = plugin.load().spec.summary
        except PluginError as error:
            commands[plugin.name] = str(error)
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in sorted(commands.items()))
    return f"""timetrial {__version__}: training workloads raced against the clock, composed from plugins.

usage: timetrial COMMAND ...     (`timetrial COMMAND --help` says more)

{lines}

Without a command it is `run`: timetrial workload=resnet +opt=amp"""


if __name__ == "__main__":
    sys.exit(main())
