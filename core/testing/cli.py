"""Runs the real command line in a separate process, and reads the run folder that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from core.api.files import read_json
from core.testing.forkserver import ForkServer, rank_places

TIMEOUT_S = 800


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and its run folder."""

    code: int
    stdout: str
    stderr: str
    refusal: str
    """Kind of the error that ended it before it had a run folder; "" where none did."""
    run_dir: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "result.json").read_text())

    @property
    def failure(self) -> str:
        """Kind of the error that ended it, such as "conflict" (`core.api.errors`)."""
        error = read_json(self.run_dir / "result.json").get("error") if self.run_dir != Path() else None
        return self.refusal or (error or {}).get("kind", "")

    @property
    def evidence(self) -> dict[str, Any]:
        """Evidence at the end of the run, by plugin."""
        return {e["plugin"]: e for e in json.loads((self.run_dir / "evidence.json").read_text())["end"]}

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [loss for line in lines for loss in json.loads(line).get("losses", [])]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The model in the newest checkpoint."""
        folder = max((self.run_dir / "checkpoints").glob("step_*"))
        tensors = safetensors.torch.load_file(folder / "shared.safetensors")
        prefix = "shared/model/"
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    def expect(self, code: int) -> Outcome:
        """Itself, if the command ended with this exit status; otherwise an assertion with all that it printed."""
        traces = "".join(p.read_text() for p in self.run_dir.glob("errors/*.txt")) if self.run_dir != Path() else ""
        assert self.code == code, f"exit {self.code}, expected {code}\n{self.stdout}\n{self.stderr}\n{traces}"
        return self


_server = ForkServer()


def run_ranks(*overrides: str, run_dir: Path, fault: str = "", **env: str) -> Outcome:
    """As `run_cli`, but where `launch.nproc` asks for several ranks, they come as from an outer launcher: seconds less.
    The outcome is that of rank 0."""
    asked = [override for override in overrides if override.startswith("launch.nproc=")]
    ranks = int(asked[-1].partition("=")[2]) if asked else 1
    arguments = [*overrides, f"run_dir={run_dir}"]
    return Outcome(*_server.run(arguments, run_dir.parent, environment(fault, **env), ranks), run_dir)


def run_cli(*overrides: str, run_dir: Path, fault: str = "", cwd: Path | None = None, **env: str) -> Outcome:
    """`python -m core.run OVERRIDES run_dir=RUN_DIR`; `fault` is armed as core/api/faults.py describes."""
    return run_raw(*overrides, f"run_dir={run_dir}", cwd=cwd or run_dir.parent, run_dir=run_dir, fault=fault, **env)


def run_raw(*arguments: str, cwd: Path, run_dir: Path = Path(), fault: str = "", **env: str) -> Outcome:
    """`python -m core.run ARGUMENTS`, as typed."""
    return Outcome(*_server.run(list(arguments), cwd, environment(fault, **env)), run_dir)


def run_program(program: Path, *arguments: str, nodes: str) -> list[Outcome]:
    """`python PROGRAM ARGUMENTS` as a rank for each digit of `nodes`, which says its node; all on this host."""
    places = [{**place, "GROUP_RANK": node} for place, node in zip(rank_places(len(nodes)), nodes, strict=True)]
    ended = _server.run_program(program, arguments, [environment(**place) for place in places])
    return [Outcome(code, printed, errors, "", Path()) for code, printed, errors in ended]


def run_fresh(*arguments: str, cwd: Path, run_dir: Path = Path(), fault: str = "", **env: str) -> Outcome:
    """As `run_raw`, in a fresh interpreter."""
    process = subprocess.run(
        [sys.executable, "-m", "core.run", *arguments],
        capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cwd, env=environment(fault, **env),
    )  # fmt: skip
    return Outcome(process.returncode, process.stdout, process.stderr, "", run_dir)


def run_timetrial(*arguments: str, cwd: Path, **env: str) -> Outcome:
    """`timetrial ARGUMENTS` (as `python -m core`), in a fresh interpreter."""
    command = [sys.executable, "-m", "core", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cwd, env=environment(**env))
    return Outcome(done.returncode, done.stdout, done.stderr, "", Path())


def environment(fault: str = "", **extra: str) -> dict[str, str]:
    """This process's environment, without what a launcher would have set, for a command under test."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in launcher}
    env.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
    return {**env, **({"TIMETRIAL_FAULT": fault} if fault else {}), **extra}
