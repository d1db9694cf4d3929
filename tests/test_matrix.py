"""Every opt on every workload, and every pair of opts on a workload that offers both, trains as declared or is refused
as declared. Minutes: `-m matrix`. tools/matrix.py prints the same cells as tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from core.testing.matrix import installed_opts, pairs, try_composition

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from matrix import SETTINGS, TRIPLES, WORKLOADS, try_pair

pytestmark = [pytest.mark.matrix, pytest.mark.distributed]


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("opt", sorted(installed_opts()))
def test_an_opt_trains_or_is_refused_as_declared(opt: str, workload: str) -> None:
    cell = try_composition(WORKLOADS[workload], (opt,), SETTINGS)
    assert cell.verdict != "broken", cell.words


@pytest.mark.parametrize("opts", [*pairs(), *TRIPLES], ids="+".join)
def test_opts_together_train_or_are_refused_as_declared(opts: tuple[str, ...]) -> None:
    workload, cell = try_pair(opts, list(WORKLOADS))
    assert cell.verdict != "broken", f"{workload}: {cell.words}"
