"""The command line: compose -> resolve -> launch -> report one line.

    python -m core.run workload=bert backend=nccl +opt=cuda_graphs

Hydra composes the configuration, sweeps (`-m`) and completes on TAB; what is here turns its errors into one line.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core import __version__
from core.discovery import KINDS, Registry, discover
from core.errors import EXIT_CODES, TimetrialError, UsageError, exit_status, nearest

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


def main() -> int:
    """The entry point of `python -m core.run` and of the console script `timetrial`. Returns the exit status."""
    gc.disable()  # until the clock starts: looking for garbage that is not there made importing torch 0.3 s slower
    return exit_status(_main)


def _main() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true")
    for flag in ("--no-plugin", "--only-plugins"):
        parser.add_argument(flag, action="append", default=[])
    try:
        flags, arguments = parser.parse_known_args()
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    blocked, allowed = (
        [name for names in flag for name in names.split(",")] for flag in (flags.no_plugin, flags.only_plugins)
    )
    registry = discover(blocked, allowed or None)
    if flags.help:
        groups = (*KINDS, "data", "launch", "experiment")
        lines = [f"  {group + '=':<12} {', '.join(_options_of(group, registry))}" for group in groups]
        print(HELP.format(version=__version__, options="\n".join(lines)), end="")
        return 0
    return _compose_and_run(arguments, registry, flags.debug)


def _conf_dir() -> Path:
    """Core's configuration: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    return next(path for path in (package / "conf", package.parent / "conf") if path.is_dir())


def _options_of(group: str, registry: Registry) -> list[str]:
    """The options of a configuration group: core's own, and those of the installed plugins."""
    own = {path.stem for path in (_conf_dir() / group).glob("*.yaml")}
    return sorted(own | set(registry.names(group)))


def _compose_and_run(arguments: list[str], registry: Registry, debug: bool) -> int:
    if any(a.split("=")[0] == "--experimental-rerun" for a in arguments):
        raise UsageError("--experimental-rerun is refused: it executes a pickle; give the overrides instead")
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from core.launch import launch
    from core.record import new_run_name, write_failure
    from core.report import print_sweep, summary
    from core.resolve import resolve

    code = 0
    jobs: list[tuple[list[str], Path, int]] = []  # of a sweep

    def job(config: Any) -> None:
        nonlocal code
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
                print(f"timetrial: {summary(run_dir)}", file=sys.stderr if code else sys.stdout, flush=True)
        except TimetrialError as error:
            code = error.show(debug)
            if multirun:
                write_failure(run_dir, error.as_dict())
        if multirun:
            jobs.append((overrides, run_dir, code))
            if code == EXIT_CODES["stopped"]:
                raise KeyboardInterrupt

    sys.argv = [sys.argv[0], *arguments]
    sweep_dir = str(Path("runs", new_run_name("sweep")).absolute())  # one for all the jobs of a sweep
    try:
        with _composing(registry, sweep_dir):
            hydra.main(version_base=None, config_path=str(_conf_dir()), config_name="config")(job)()
    finally:
        if jobs:
            print_sweep(jobs)
    return EXIT_CODES["failed"] if any(failed for _, _, failed in jobs) else code


def _refuse_duplicates(overrides: list[str]) -> None:
    """Hydra would take an option that is named twice in one list as if it stood there once."""
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        names = [name.strip() for name in value.strip("[]").split(",")]
        twice = [name for name in names if name and names.count(name) > 1]
        if group == "opt" and twice:
            raise UsageError(f"opt '{twice[0]}' is given twice; name each opt once")


@contextmanager
def _composing(registry: Registry, sweep_dir: str = "") -> Generator[None]:
    """Hydra with the plugins' configuration folders on its search path, and with errors of one line."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException
    from hydra.plugins.search_path_plugin import SearchPathPlugin
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    class TimetrialSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for path in dict.fromkeys(plugin.conf_dir for plugin in registry.plugins if plugin.conf_dir.is_dir()):
                search_path.append("timetrial", f"file://{path}")

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the message is ours to shape
    Plugins.instance().register(TimetrialSearchPath)
    OmegaConf.register_new_resolver("timetrial.sweep_dir", lambda: sweep_dir, replace=True)
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, registry)) from error


def _explain(error: Exception, registry: Registry) -> str:
    """A composition error in one line, with the nearest valid name."""
    from hydra.errors import MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    from core.config import unknown_key

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if option in registry.blocked:
            return f"{group} '{option}' is blocked by --no-plugin"
        options = _options_of(group, registry)
        return f"{group} '{option}' is not installed: {nearest(option, options)}; installed: {', '.join(options)}"
    if isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
        return unknown_key(error.__cause__)
    text = " ".join(str(error).split())
    twice, known, _ = text.partition(" appears more than once in the final defaults list")
    return f"an option of '{twice.split()[-1]}' is given twice; name each once, as in '+opt=[a,b]'" if known else text


def compose(overrides: list[str], registry: Registry) -> tuple[Any, Any]:
    """The configuration of these overrides and the option chosen in each group, for a command that starts no run."""
    import hydra
    from omegaconf import open_dict

    with _composing(registry), hydra.initialize_config_dir(str(_conf_dir()), version_base=None):
        config = hydra.compose("config", overrides, return_hydra_config=True)
    with open_dict(config):
        return config, config.pop("hydra").runtime.choices


if __name__ == "__main__":
    sys.exit(main())
