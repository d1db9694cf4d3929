"""The composition matrix: what each composition of opts does, compared with the verdicts that are checked in.

A verdict is "bitwise", "tolerance" or "changes" for one that trains, with evidence from each opt and numbers as they
declare; the kind of the refusal ("conflict", "not_offered", "not_here", "usage") for one that does not start; and
"broken" for everything else. A refusal that should not be there is a verdict that differs from the one that was agreed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import cast

import torch

from core.api.mesh import Mesh
from core.api.types import OptSpec
from core.compose.discovery import Installed, discover
from core.compose.plan import RunPlan
from core.testing.cli import Outcome, run_ranks

RANKS = 4
"""For opts that require several: two nodes of two, where an opt is told so."""
CHANGES_BY = 0.25
"""Largest relative difference of a loss from the baseline's, in a few steps, where an opt "changes" the numbers."""
REFUSALS = frozenset({"conflict", "not_offered", "not_here"})
"""Kinds of refusal that a composition may end in. "usage" and "plugin" are a mistake of the command or of a plugin."""
_ENDED = (0, 4)
"""Exit statuses of a run to its last step: on synthetic data, and on real."""


@dataclass(frozen=True)
class Cell:
    """The result of one composition."""

    verdict: str
    words: str = ""  # of the refusal, or of what is broken


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

    `settings` holds what single opts need, such as `opt.sharp.ranks_per_node=2`. Where all opts keep the numbers, the
    losses must equal the baseline's within `rtol`; where all keep the bits, so must the parameters'. The baseline has
    as many data ranks: each draws its own synthetic batch.
    """
    specs = [spec_of(name) for name in opts]
    ranks = RANKS if any("multi_rank" in spec.requires for spec in specs) else 1
    more = [setting for name in opts for setting in settings.get(name, ())]
    command = [*workload, "backend=gloo", f"launch.nproc={ranks}", f"opt=[{','.join(opts)}]", *more]
    with tempfile.TemporaryDirectory() as folder:
        run = run_ranks(*command, run_dir=Path(folder, "run"))
        if run.code in _ENDED:
            data_size = Mesh(RunPlan.load(run.run_dir / "resolved.yaml").dimensions).data_size
            baseline = _baseline(*workload, "backend=gloo", f"launch.nproc={data_size}")
            return _judge(run, opts, specs, baseline, rtol)
        kind = run.failure
    words = run.stderr.strip().splitlines()[-1].removeprefix("timetrial: ") if run.stderr.strip() else ""
    return Cell(kind, words) if kind in REFUSALS else Cell("broken", f"exit {run.code} ({kind}): {words}")


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
        return Cell("bitwise") if same else Cell("broken", "declared bitwise, but the parameters differ")
    kept = "changes" if "changes" in numerics else "tolerance"
    limit = CHANGES_BY if kept == "changes" else rtol
    mine, theirs = torch.tensor(run.losses), torch.tensor(losses)
    worst = float(((mine - theirs).abs() / theirs.abs()).max()) if len(mine) == len(theirs) else float("inf")
    if not worst <= limit:
        return Cell("broken", f"declared {kept}, but a loss differs from the baseline's by {worst:.2g}")
    return Cell(kept)
