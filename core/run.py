"""`timetrial run`, or `python -m core.run`: compose -> resolve -> launch -> report one line.

    python -m core.run workload=bert backend=nccl +opt=cuda_graphs

Hydra composes the configuration, sweeps (`-m`) and completes on TAB.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from core import __version__
from core.api.errors import EXIT_CODES, TimetrialError, UsageError, exit_status
from core.compose.composition import CONF, compose, composing, options_of, refuse_twice
from core.compose.discovery import GROUPS, Registry, discover
from core.compose.resolve import resolve
from core.launch.start import launch
from core.state.record import write_failure
from core.state.report import print_sweep, summary


def main() -> int:
    """The entry point of `python -m core.run`. Returns the exit status."""
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
        groups = (*GROUPS.values(), "data", "experiment")
        options = "\n".join(f"  {group + '=':<12} {', '.join(options_of(group, registry))}" for group in groups)
        print((CONF / "help.txt").read_text().format(version=__version__, options=options), end="")
        return 0
    if any(a.split("=")[0] == "--experimental-rerun" for a in arguments):
        raise UsageError("--experimental-rerun is refused: it executes a pickle; give the overrides instead")
    if any(argument.lstrip("+~").startswith(("-", "hydra")) for argument in arguments):
        return _run_by_hydra(arguments, registry, flags.debug)
    return _run(*compose(arguments, registry), registry)[1]  # Hydra's own main composes twice: 0.1 s


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
            refuse_twice(overrides)
            run_dir, code = _run(config, hydra_config.runtime.choices, registry, isolate=multirun)
        except TimetrialError as error:
            run_dir, code = Path(config.run_dir or ""), error.show(debug)
            if multirun:
                write_failure(run_dir, error.as_dict())
        jobs.append((overrides, run_dir, code))
        if multirun and code == EXIT_CODES["stopped"]:
            raise KeyboardInterrupt

    sys.argv = [sys.argv[0], *arguments]
    try:
        with composing(registry, arguments):
            hydra.main(version_base=None, config_path=str(CONF), config_name="config")(job)()
    finally:
        if multirun and jobs:
            print_sweep(jobs)
    failures = [code for _, _, code in jobs if code]
    return failures[0] if failures and not multirun else EXIT_CODES["failed" if failures else "success"]


def _run(config: Any, choices: Any, registry: Registry, isolate: bool = False) -> tuple[Path, int]:
    """One run, to the line that says how it ended. Returns its folder and its exit status."""
    run_dir, code = launch(resolve(config, choices, registry), isolate=isolate)
    if run_dir != Path():  # an outer launcher's other ranks have none
        print(f"timetrial: {summary(run_dir)}", file=sys.stderr if code else sys.stdout, flush=True)
    return run_dir, code


if __name__ == "__main__":
    sys.exit(main())
