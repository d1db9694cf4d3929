"""Hydra, with the installed plugins' configuration on its search path and errors of one line."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from core.api.config import unknown_key
from core.api.errors import UsageError, nearest
from core.compose.discovery import GROUPS, Registry
from core.compose.plan import new_run_name
from core.compose.renamed import old_key

PACKAGE = Path(__file__).parents[1]
CONF = next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir())
"""Core's configuration: inside the package in a wheel, beside it in a checkout."""


def compose(overrides: list[str], registry: Registry) -> tuple[Any, Any]:
    """The configuration of these overrides, and the option chosen in each group."""
    refuse_twice(overrides)
    with composing(registry, overrides), hydra.initialize_config_dir(str(CONF), version_base=None):
        config = hydra.compose("config", overrides, return_hydra_config=True)
    ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return ours, config.hydra.runtime.choices


def refuse_twice(overrides: Iterable[str]) -> None:
    """UsageError where one list names an option twice, which Hydra treats as if it were there once."""
    for group in ("opt", "tracker"):
        lists = (o for o in overrides if o.lstrip("+").startswith(f"{group}="))
        names = [name for text in lists for name in re.findall(r"\w+", text)[1:]]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UsageError(f"{group} '{twice[0]}' is given twice; name each {group} once")


def options_of(group: str, registry: Registry) -> list[str]:
    """The options of a configuration group: core's own, and those of the installed plugins."""
    kinds = [kind for kind, its_group in GROUPS.items() if its_group == group]
    installed = {name for kind in kinds for name in registry.names(kind)}
    return sorted({path.stem for path in (CONF / group).glob("*.yaml")} | installed)


@contextmanager
def composing(registry: Registry, overrides: list[str]) -> Generator[None]:
    """Within it, Hydra finds the plugins' options, and its errors become UsageError."""

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
        options = options_of(group, registry)
        return f"{group} '{option}' is not installed: {nearest(option, options)}; installed: {', '.join(options)}"
    if isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
        return unknown_key(error.__cause__)
    text = " ".join(str(error).split())
    twice, known, _ = text.partition(" appears more than once in the final defaults list")
    return f"an option of '{twice.split()[-1]}' is given twice; name each once, as in '+opt=[a,b]'" if known else text
