"""The composition matrix: every pair of opts either trains as both declare, or is refused with the declared reason."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Literal, cast

import torch

from core.api.types import OptSpec
from core.compose.discovery import Installed, discover
from core.testing.cli import Outcome, run_ranks

RANKS = 4
"""For opts that require several: two nodes of two, where an opt is told so."""
CHANGES_BY = 0.25
"""Largest relative difference of a loss from the baseline's, in a few steps, where an opt "changes" the numbers."""
_ENDED = (0, 4)
"""Exit statuses of a run to its last step: on synthetic data, and on real."""


@dataclass(frozen=True)
class Cell:
    """What became of one composition."""

    verdict: Literal["trains", "conflict", "not here", "not offered", "broken"]
    """`not here`: this machine lacks what an opt requires. `not offered`: the workload lacks what an opt replaces."""
    words: str = ""


@cache
def installed_opts() -> dict[str, Installed]:
    return {plugin.name: plugin for plugin in discover().plugins if plugin.kind == "opt"}


def spec_of(name: str) -> OptSpec:
    return cast(OptSpec, installed_opts()[name].load().spec)


def pairs() -> list[tuple[str, str]]:
    return list(combinations(sorted(installed_opts()), 2))


def try_composition(
    workload: Sequence[str], opts: Sequence[str], settings: Mapping[str, Sequence[str]], rtol: float = 1e-2
) -> Cell:
    """Runs `workload` (overrides that choose and shrink it, and `stop.steps`) with `opts` on the CPU and judges it.

    `settings` holds what single opts need, such as `opt.sharp.ranks_per_node=2`. Where both opts keep the numbers, the
    losses must equal the baseline's within `rtol`; where both keep the bits, so must the parameters'.
    """
    specs = [spec_of(name) for name in opts]
    ranks = RANKS if any("multi_rank" in spec.requires for spec in specs) else 1
    more = [setting for name in opts for setting in settings.get(name, ())]
    command = [*workload, "backend=gloo", f"launch.nproc={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        run = run_ranks(*command, f"opt=[{','.join(opts)}]", *more, run_dir=Path(folder, "run"))
        if run.code in _ENDED:
            return _judge(run, opts, specs, _baseline(*command), rtol)
    words = run.stderr.strip().splitlines()[-1].removeprefix("timetrial: ") if run.stderr.strip() else ""
    if run.code != 2:
        return Cell("broken", f"exit {run.code}: {words}")
    if " requires " in words:
        return Cell("not here", words)
    if " does not offer" in words or " does not apply " in words:
        return Cell("not offered", words)
    declared = any(spec.conflicts.keys() & set(opts) for spec in specs)
    claimed = any(one.claims & two.claims for one, two in combinations(specs, 2))
    return Cell("conflict", words) if declared or claimed else Cell("broken", f"refused undeclared: {words}")


@cache
def _baseline(*command: str) -> tuple[list[float], str]:
    with tempfile.TemporaryDirectory() as folder:
        run = run_ranks(*command, run_dir=Path(folder, "run"))
        assert run.code in _ENDED, run.stderr
        return run.losses, run.result["parameters_sha256"]


def _judge(
    run: Outcome, opts: Sequence[str], specs: Sequence[OptSpec], baseline: tuple[list[float], str], rtol: float
) -> Cell:
    evidence = run.evidence
    silent = [f"{name}: {evidence[name]['summary']}" for name in opts if not evidence[name]["active"]]
    if silent:
        return Cell("broken", f"no evidence for {'; '.join(silent)}")
    losses, parameters = baseline
    # An opt may find that in this composition it does more to the numbers than its spec says (batch statistics, say).
    numerics = {evidence[name].get("numerics") or spec.numerics for name, spec in zip(opts, specs, strict=True)}
    if numerics == {"bitwise"}:
        same = run.result["parameters_sha256"] == parameters
        return Cell("trains", "bitwise") if same else Cell("broken", "declared bitwise, but the parameters differ")
    limit = CHANGES_BY if "changes" in numerics else rtol
    mine, theirs = torch.tensor(run.losses), torch.tensor(losses)
    worst = float(((mine - theirs).abs() / theirs.abs()).max()) if len(mine) == len(theirs) else float("inf")
    kept = "changes" if "changes" in numerics else "tolerance"
    if not worst <= limit:
        return Cell("broken", f"declared {kept}, but a loss differs from the baseline's by {worst:.2g}")
    return Cell("trains", kept)
