"""The command line: compose -> resolve -> launch -> report one line.

    python -m core.run workload=bert backend=nccl +opt=cuda_graphs

Hydra composes the configuration, sweeps (`-m`) and completes on TAB; what is here turns its errors into one line.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from core import __version__
from core.discovery import KINDS, Registry, discover
from core.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_SUCCESS, TimetrialError, UsageError, nearest

HELP = """\
timetrial {version}: training workloads raced against the clock, composed from plugins.

usage: python -m core.run [flags] [group=option] [key=value] ...     (or: timetrial ...)

groups and installed options (`python -m core.plugins` says more):
{options}

often used keys (`--cfg job` prints all, with their values):
  seed=N|clock  run_dir=PATH  launch.nproc=N  stop.steps=N  stop.seconds=N  stop.epochs=N  data.root=PATH

examples:
  python -m core.run                                                    ResNet on its embedded data, to its target
  python -m core.run workload=resnet launch.nproc=2 '+opt=[amp,channels_last]'
  python -m core.run -m workload=resnet 'opt=[],amp' 'seed=range(3)'    a sweep of 6 runs and a table

flags:
  --help                 this page; --hydra-help for Hydra's own flags
  --cfg job              print the composed configuration and stop
  -m, --multirun         run every combination of comma-separated values, one after the other
  --no-plugin NAME       never import this plugin; --only-plugins A,B allows no other
  --debug                show the traceback of an error
  --version              print the version
"""


def conf_dir() -> Path:
    """Core's configuration: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def options_of(group: str, registry: Registry) -> list[str]:
    """The options of a configuration group: core's own, and those of the installed plugins."""
    own = {path.stem for path in (conf_dir() / group).glob("*.yaml")}
    return sorted(own | {plugin.name for plugin in registry.plugins if plugin.kind == group})


def main() -> int:
    """The entry point of `python -m core.run` and of the console script `timetrial`. Returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--help", "--version", "--debug"):
        parser.add_argument(flag, *(["-h"] if flag == "--help" else []), action="store_true")
    for flag in ("--no-plugin", "--only-plugins"):
        parser.add_argument(flag, action="append", default=[])
    flags = argparse.Namespace(debug="--debug" in sys.argv)
    try:
        flags, arguments = parser.parse_known_args()
        if flags.version:
            print(__version__)
            return EXIT_SUCCESS
        only = ",".join(flags.only_plugins)
        registry = discover(",".join(flags.no_plugin).split(","), only.split(",") if only else None)
        if flags.help:
            groups = (*KINDS, "data", "launch", "experiment")
            lines = [f"  {group + '=':<12} {', '.join(options_of(group, registry))}" for group in groups]
            print(HELP.format(version=__version__, options="\n".join(lines)), end="")
            return EXIT_SUCCESS
        return _compose_and_run(arguments, registry, flags.debug)
    except argparse.ArgumentError as error:
        print(f"timetrial: {error}", file=sys.stderr)
        return UsageError.exit_code
    except TimetrialError as error:
        return _show(error, flags.debug)
    except KeyboardInterrupt:
        print("timetrial: stopped", file=sys.stderr)
        return EXIT_STOPPED


def _show(error: TimetrialError, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"timetrial: {error}", file=sys.stderr)
    return error.exit_code


def _compose_and_run(arguments: list[str], registry: Registry, debug: bool) -> int:
    if any(a.split("=")[0] == "--experimental-rerun" for a in arguments):
        raise UsageError("--experimental-rerun is refused: it executes a pickle; give the overrides instead")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the message is ours to shape
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from core.launch import launch, summary
    from core.record import write_failure
    from core.resolve import resolve
    from core.sweep import Sweep

    sweep = Sweep()
    outcome = [EXIT_SUCCESS]

    def job(config: Any) -> None:
        hydra_config = HydraConfig.get()
        multirun = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
        overrides = list(hydra_config.overrides.task)
        if multirun:
            config.run_dir = config.run_dir or hydra_config.runtime.output_dir
        run_dir = Path(config.run_dir or "")
        try:
            _refuse_duplicates(overrides)
            run_dir, code = launch(resolve(config, hydra_config.runtime.choices, registry), isolate=multirun)
            if run_dir != Path():  # an outer launcher's other ranks have none
                print(f"timetrial: {summary(run_dir)}", file=sys.stdout if code == 0 else sys.stderr, flush=True)
        except TimetrialError as error:
            code = _show(error, debug)
            if multirun:
                write_failure(run_dir, error.as_dict())
        outcome[0] = code
        if multirun:
            sweep.add(overrides, run_dir, code)
            if code == EXIT_STOPPED:
                raise KeyboardInterrupt

    _register_search_path(registry)
    sys.argv = [sys.argv[0], *arguments]
    try:
        hydra.main(version_base=None, config_path=str(conf_dir()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, arguments, registry)) from error
    finally:
        sweep.print_table()
    if sweep.jobs:
        return EXIT_SUCCESS if all(job.code == EXIT_SUCCESS for job in sweep.jobs) else EXIT_FAILED
    return outcome[0]


def _refuse_duplicates(overrides: list[str]) -> None:
    """Hydra would take an option that is named twice in one list as if it stood there once."""
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        names = [name.strip() for name in value.strip("[]").split(",")]
        twice = [name for name in names if name and names.count(name) > 1]
        if group == "opt" and twice:
            raise UsageError(f"opt '{twice[0]}' is given twice; name each opt once")


def _register_search_path(registry: Registry) -> None:
    """Adds the plugins' configuration folders to Hydra's search path, without importing a plugin."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin
    from omegaconf import OmegaConf

    from core.record import new_run_name

    class TimetrialSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for path in registry.search_path():
                search_path.append("timetrial", f"file://{path}")

    Plugins.instance().register(TimetrialSearchPath)
    folder = str(Path("runs", new_run_name("sweep")).absolute())  # one for all the jobs of a sweep
    OmegaConf.register_new_resolver("timetrial.sweep_dir", lambda: folder, replace=True)


def _explain(error: Exception, arguments: list[str], registry: Registry) -> str:
    """A composition error in one line, with the nearest valid name."""
    text = " ".join(str(error).split())
    missing = re.search(r"Could not find '([\w/]*?)/?([^/']+)'", text)
    if missing:
        group, option = missing.groups()
        if option in registry.blocked:
            return f"{group} '{option}' is blocked by --no-plugin"
        options = options_of(group, registry)
        return f"{group} '{option}' is not installed: {nearest(option, options)}; installed: {', '.join(options)}"
    unknown = re.search(r"Could not override '([\w.]+)'", text)
    if unknown:
        return f"unknown key '{unknown[1]}': {nearest(unknown[1], _known_keys(arguments, unknown[1]))}"
    twice = re.search(r"(\S+) appears more than once in the final defaults list", text)
    if twice:
        return f"an option of '{twice[1]}' is given twice; name each once, as in '+opt=[a,b]'"
    return text


def _known_keys(arguments: list[str], unknown: str) -> list[str]:
    """The keys of the configuration composed without the override that failed."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from core.config import flatten

    overrides = [a for a in arguments if "=" in a and not a.startswith("-") and unknown not in a]
    try:
        return list(flatten(OmegaConf.to_container(_compose(overrides), resolve=False)))
    except HydraException:
        return []


def compose(overrides: list[str], registry: Registry) -> tuple[Any, Any]:
    """The configuration of these overrides and the option chosen in each group, for a command that starts no run."""
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    _register_search_path(registry)
    try:
        config = _compose(overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, overrides, registry)) from error
    with open_dict(config):
        return config, config.pop("hydra").runtime.choices


def _compose(overrides: list[str], **options: bool) -> Any:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base=None):
        return hydra.compose("config", overrides, **options)


if __name__ == "__main__":
    sys.exit(main())
