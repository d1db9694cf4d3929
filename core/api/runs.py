"""Run folders, for those who read them: commands, and programs that use what a run has trained. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.api.errors import UsageError
from core.api.files import read_json

__all__ = ["SavedRun", "read_run"]


@dataclass(frozen=True)
class SavedRun:
    """What a run folder says of its run."""

    folder: Path
    config: dict[str, Any]
    """The whole configuration as composed; interpolations are kept, so that it holds no secret."""
    plugins: list[dict[str, str]]
    """Backend, opts and workload: kind, name, target, distribution, version and hash of each."""
    result: dict[str, Any]
    """result.json, as core/state/result.schema.json describes it."""

    @property
    def workload(self) -> dict[str, str]:
        return next(plugin for plugin in self.plugins if plugin["kind"] == "workload")


def read_run(folder: Path) -> SavedRun:
    """Reads resolved.yaml and result.json. UsageError where the folder is not that of a run."""
    path = folder / "resolved.yaml"
    try:
        plan = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path), resolve=False))
        return SavedRun(folder, plan["config"], plan["plugins"], read_json(folder / "result.json"))
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a run folder: it has no resolved.yaml") from None
    except (OSError, OmegaConfBaseException, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as a plan: {type(error).__name__}: {error}") from None
