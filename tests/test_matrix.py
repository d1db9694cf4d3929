"""Every pair of installed opts trains as declared, or is refused as declared, on a plain, a convolutional and a
transformer workload. Minutes: `-m matrix`. tools/matrix.py prints the same cells as a table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from core.testing.matrix import pairs, try_composition

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from matrix import SETTINGS, TRIPLES, WORKLOADS

pytestmark = [pytest.mark.matrix, pytest.mark.distributed]


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("opts", [*pairs(), *TRIPLES], ids="+".join)
def test_a_composition_trains_or_is_refused_as_declared(opts: tuple[str, ...], workload: str) -> None:
    cell = try_composition(WORKLOADS[workload], opts, SETTINGS)
    assert cell.verdict != "broken", cell.words
