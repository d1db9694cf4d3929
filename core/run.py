"""The command line: compose -> resolve -> launch -> report one line.

    python -m core.run workload=bert backend=nccl +opt=cuda_graphs

Hydra composes the configuration, sweeps (`-m`) and completes on TAB; what is here turns its errors into one line.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from core import __version__
from core.discovery import Registry, discover
from core.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_SUCCESS, TimetrialError, UsageError, nearest

FLAGS = """\
  --help                 this page; --hydra-help for Hydra's own flags
  --cfg job              print the composed configuration and stop
  -m, --multirun         run every combination of comma-separated values, one after the other
  --no-plugin NAME       never import this plugin; --only-plugins A,B allows no other
  --debug                show the traceback of an error
  --trace-hooks          write every hook call to hooks.log in the run folder
  --version              print the version"""


def conf_dir() -> Path:
    """Core's configuration: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def help_text(registry: Registry) -> str:
    groups = {
        "workload": registry.names("workload"),
        "backend": ["auto", *registry.names("backend")],
        "opt": registry.names("opt"),
        **{g: sorted(p.stem for p in (conf_dir() / g).glob("*.yaml")) for g in ("data", "launch", "experiment")},
    }
    options = "\n".join(
        f"  {group + '=':<12} {', '.join(names) or '(none installed)'}" for group, names in groups.items()
    )
    return f"""\
timetrial {__version__}: training workloads raced against the clock, composed from plugins.

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
{FLAGS}
"""


def main() -> int:
    """The entry point of `python -m core.run` and of the console script `timetrial`. Returns the exit status."""
    arguments, debug = sys.argv[1:], "--debug" in sys.argv
    try:
        return _main(arguments)
    except TimetrialError as error:
        _show(error, debug)
        return error.exit_code
    except KeyboardInterrupt:
        print("timetrial: stopped", file=sys.stderr)
        return EXIT_STOPPED


def _show(error: Exception, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"timetrial: {error}", file=sys.stderr)


def _take_values(arguments: list[str], flag: str) -> list[str]:
    """The values of every `flag VALUE` and `flag=VALUE`, which are removed."""
    values: list[str] = []
    for position in reversed(range(len(arguments))):
        name, equals, value = arguments[position].partition("=")
        if name == flag:
            if not equals and position + 1 == len(arguments):
                raise UsageError(f"{flag} needs a name")
            values += (value if equals else arguments[position + 1]).split(",")
            del arguments[position : position + (1 if equals else 2)]
    return values


def _main(arguments: list[str]) -> int:
    debug, trace = "--debug" in arguments, "--trace-hooks" in arguments
    arguments = [a for a in arguments if a not in ("--debug", "--trace-hooks")]
    blocked, allowed = _take_values(arguments, "--no-plugin"), _take_values(arguments, "--only-plugins")
    if "--version" in arguments:
        print(__version__)
        return EXIT_SUCCESS
    if any(a.split("=")[0] == "--experimental-rerun" for a in arguments):
        raise UsageError("--experimental-rerun is refused: it executes a pickle; give the overrides instead")
    registry = discover(blocked, allowed or None)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(registry), end="")
        return EXIT_SUCCESS
    return _compose_and_run(arguments, registry, debug, trace)


def _compose_and_run(arguments: list[str], registry: Registry, debug: bool, trace: bool) -> int:
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
        try:
            _refuse_duplicates(list(hydra_config.overrides.task))
            if multirun:
                config.run_dir = config.run_dir or hydra_config.runtime.output_dir
            run_dir, code = launch(
                resolve(config, hydra_config.runtime.choices, registry), isolate=multirun, trace_hooks=trace
            )
            if run_dir != Path():
                print(f"timetrial: {summary(run_dir)}", file=sys.stdout if code == 0 else sys.stderr, flush=True)
        except TimetrialError as error:
            _show(error, debug)
            run_dir, code = Path(config.run_dir or ""), error.exit_code
            if multirun:
                write_failure(run_dir, {"kind": error.kind, "status": error.status, "message": error.message})
        outcome[0] = code
        if multirun:
            sweep.add(list(hydra_config.overrides.task), run_dir, code)
            if code == EXIT_STOPPED:
                raise KeyboardInterrupt

    _register_search_path([f"file://{path}" for path in registry.search_path()], sweep)
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
        names = [n.strip() for n in value.strip("[]").split(",")]
        for name in names:
            if group == "opt" and name and names.count(name) > 1:
                raise UsageError(f"opt '{name}' is given twice; name each opt once")


def _register_search_path(paths: list[str], sweep: Any) -> None:
    """Adds the plugins' configuration folders to Hydra's search path, without importing a plugin."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin
    from omegaconf import OmegaConf

    class TimetrialSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for path in paths:
                search_path.append("timetrial", path)

    Plugins.instance().register(TimetrialSearchPath)
    OmegaConf.register_new_resolver("timetrial.sweep_dir", sweep.folder, replace=True)


def _explain(error: Exception, arguments: list[str], registry: Registry) -> str:
    """A composition error in one line, with the nearest valid name."""
    from hydra.errors import MissingConfigException

    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = {"workload", "backend", "opt"} & {group} and registry.names(group)  # pyright: ignore[reportArgumentType]
        options = options or sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))
        if option in registry.blocked:
            return f"{group} '{option}' is blocked by --no-plugin"
        return f"{group or 'option'} '{option}' is not installed: {nearest(option, options)}; installed: {', '.join(options)}"
    unknown = re.search(r"Could not override '([\w.]+)'", text)
    if unknown:
        key = unknown[1]
        return f"unknown key '{key}': {nearest(key, _known_keys(arguments, key))}"
    twice = re.search(r"(\S+) appears more than once in the final defaults list", text)
    if twice:
        return f"an option of '{twice[1].partition('/')[0]}' is given twice ({twice[0]}); name each once: '+opt=[a,b]'"
    return text


def _known_keys(arguments: list[str], unknown: str) -> list[str]:
    """The keys of the configuration composed without the override that failed."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from core.config import flatten

    GlobalHydra.instance().clear()
    overrides = [a for a in arguments if "=" in a and not a.startswith("-") and unknown not in a]
    try:
        with initialize_config_dir(str(conf_dir()), version_base=None):
            return list(flatten(OmegaConf.to_container(compose("config", overrides), resolve=False)))
    except HydraException:
        return []


if __name__ == "__main__":
    sys.exit(main())
