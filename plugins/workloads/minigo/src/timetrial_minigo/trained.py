"""The trained network of a run folder, as a side that chooses moves; for the command lines that play it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from core.api.config import validate
from core.api.errors import UsageError
from core.api.runs import read_run
from timetrial_minigo import gating, network
from timetrial_minigo.config import MiniGoConfig
from timetrial_minigo.go import Go, Rules
from timetrial_minigo.opponent import Choose
from timetrial_minigo.workload import search_settings


@dataclass(frozen=True)
class Trained:
    """The network that a run of this workload trained, with the rules and search it was trained with. On the CPU."""

    config: MiniGoConfig
    model: network.PolicyValueNet
    name: str

    @property
    def rules(self) -> Rules:
        return Rules(self.config.size, self.config.komi, self.config.suicide)

    @property
    def history(self) -> int:
        return self.config.history

    def chooser(self, simulations: int, games: int = 1) -> Callable[[Go], Choose]:
        """Makes a side for an engine, and up to `games` games at once: the best move by a search of `simulations`,
        without noise; with 0 simulations, the network's first choice."""
        if not simulations:
            return lambda go: gating.first_choice(go, self.model, self.history)
        settings = search_settings(self.config, simulations)
        return lambda go: gating.searching(go, self.model, self.history, settings, games, symmetry_seed=None)


def load(run_dir: Path) -> Trained:
    """From the newest checkpoint of a run folder, which is safetensors: nothing in it is executed. UsageError where
    there is none."""
    run = read_run(run_dir)
    if run.workload["target"] != "timetrial_minigo.plugin:MiniGo":
        what = f"{run_dir} is a run of workload '{run.workload['name']}'"
        raise UsageError(f"{what}: give the folder of a run of minigo")
    config = validate(MiniGoConfig, run.config["workload"], "workload")
    return Trained(config, network.read(run_dir), f"timetrial {run_dir.resolve().name}")


def split_arguments(arguments: list[str], usage: str) -> tuple[Path, dict[str, Any]]:
    """The run folder and the settings KEY=VALUE of a command line. UsageError, which tells the `usage`."""
    settings = [argument for argument in arguments if "=" in argument]
    folders = [argument for argument in arguments if "=" not in argument and not argument.startswith("--")]
    if len(folders) != 1 or "--help" in arguments:
        raise UsageError(f"usage: {usage}")
    return Path(folders[0]), cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(settings)))
