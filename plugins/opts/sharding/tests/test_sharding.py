"""A model split over four real processes, in every way that the two opts split it."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.testing.cli import run_program


@pytest.mark.numbers
@pytest.mark.distributed
@pytest.mark.parametrize("what", ["everything", pytest.param("compiles", marks=pytest.mark.convergence)])
def test_four_ranks_split_a_model_and_train_as_one(what: str) -> None:
    for rank in run_program(Path(__file__).with_name("ranks.py"), what, nodes="0000"):
        rank.expect(0)
