"""The command line: compose -> resolve -> launch -> report one line.

    python -m core.run workload=bert backend=nccl +opt=cuda_graphs

Hydra composes the configuration, sweeps (`-m`) and completes on TAB; what is here turns its errors into one line.
"""

import argparse
import gc
import os
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from core import __version__
from core.api.config import unknown_key
from core.api.errors import EXIT_CODES, TimetrialError, UsageError, exit_status, nearest
from core.compose.discovery import KINDS, Registry, discover
from core.compose.renamed import old_key
from core.compose.resolve import resolve
from core.launch.start import launch
from core.state.record import new_run_name, write_failure
from core.state.report import print_sweep, summary

CONF = next(p for p in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf") if p.is_dir())
"""Core's configuration: inside the package in a wheel, beside it in a checkout."""


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
        parser.add_argument(flag, action="extend", type=lambda names: names.split(","), default=[])
    try:
        flags, arguments = parser.parse_known_args()
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    registry = discover(flags.no_plugin, flags.only_plugins or None)
    if flags.help:
        groups = (*KINDS, "data", "launch", "experiment")
        options = "\n".join(f"  {group + '=':<12} {', '.join(_options_of(group, registry))}" for group in groups)
        print((CONF / "help.txt").read_text().format(version=__version__, options=options), end="")
        return 0
    if any(a.split("=")[0] == "--experimental-rerun" for a in arguments):
        raise UsageError("--experimental-rerun is refused: it executes a pickle; give the overrides instead")
    if any(argument.lstrip("+~").startswith(("-", "hydra")) for argument in arguments):
        return _run_by_hydra(arguments, registry, flags.debug)
    return _run(*compose(arguments, registry), arguments, registry)[1]  # Hydra's own main composes twice: 0.1 s


def _options_of(group: str, registry: Registry) -> list[str]:
    """The options of a configuration group: core's own, and those of the installed plugins."""
    return sorted({path.stem for path in (CONF / group).glob("*.yaml")} | set(registry.names(group)))


def _run_by_hydra(arguments: list[str], registry: Registry, debug: bool) -> int:
    """Whatever Hydra's own flags ask for: a sweep, or one run."""
    jobs: list[tuple[list[str], Path, int]] = []
    multirun = False

    def job(config: Any) -> None:
        nonlocal multirun
        hydra_config = HydraConfig.get()
        overrides, multirun = list(hydra_config.overrides.task), hydra_config.mode == RunMode.MULTIRUN
        if multirun:
            config.run_dir = config.run_dir or hydra_config.runtime.output_dir
        try:
            run_dir, code = _run(config, hydra_config.runtime.choices, overrides, registry, isolate=multirun)
        except TimetrialError as error:
            run_dir, code = Path(config.run_dir or ""), error.show(debug)
            if multirun:
                write_failure(run_dir, error.as_dict())
        jobs.append((overrides, run_dir, code))
        if multirun and code == EXIT_CODES["stopped"]:
            raise KeyboardInterrupt

    sys.argv = [sys.argv[0], *arguments]
    try:
        with _composing(registry, arguments):
            hydra.main(version_base=None, config_path=str(CONF), config_name="config")(job)()
    finally:
        if multirun and jobs:
            print_sweep(jobs)
    failures = [code for _, _, code in jobs if code]
    return failures[0] if failures and not multirun else EXIT_CODES["failed" if failures else "success"]


def _run(
    config: Any, choices: Any, overrides: list[str], registry: Registry, isolate: bool = False
) -> tuple[Path, int]:
    """One run, to the line that says how it ended. Returns its folder and its exit status."""
    # Hydra would take an opt that is named twice in one list as if it stood there once.
    opts = [name for o in overrides if o.lstrip("+").startswith("opt=") for name in re.findall(r"\w+", o)[1:]]
    twice = [name for name in opts if opts.count(name) > 1]
    if twice:
        raise UsageError(f"opt '{twice[0]}' is given twice; name each opt once")
    run_dir, code = launch(resolve(config, choices, registry), isolate=isolate)
    if run_dir != Path():  # an outer launcher's other ranks have none
        print(f"timetrial: {summary(run_dir)}", file=sys.stderr if code else sys.stdout, flush=True)
    return run_dir, code


@contextmanager
def _composing(registry: Registry, overrides: list[str]) -> Generator[None]:
    """Hydra with the plugins' configuration folders on its search path, and with errors of one line."""

    class TimetrialSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for path in dict.fromkeys(plugin.conf_dir for plugin in registry.plugins if plugin.conf_dir.is_dir()):
                search_path.append("timetrial", f"file://{path}")

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the message is ours to shape
    Plugins.instance().register(TimetrialSearchPath)
    sweep_dir = str(Path("runs", new_run_name("sweep")).absolute())  # one for all the jobs of a sweep
    OmegaConf.register_new_resolver("timetrial.sweep_dir", lambda: sweep_dir, replace=True)
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(old_key(overrides, registry, CONF) or _explain(error, registry)) from error


def _explain(error: Exception, registry: Registry) -> str:
    """A composition error in one line, with the nearest valid name."""
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
    """The configuration of these overrides, and the option chosen in each group."""
    with _composing(registry, overrides), hydra.initialize_config_dir(str(CONF), version_base=None):
        config = hydra.compose("config", overrides, return_hydra_config=True)
    ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return ours, config.hydra.runtime.choices


if __name__ == "__main__":
    sys.exit(main())
