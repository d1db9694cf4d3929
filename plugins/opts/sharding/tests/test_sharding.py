"""A model split over four real processes, in every way that the two opts split it."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.testing.cli import run_program


@pytest.mark.numbers
@pytest.mark.distributed
def test_four_ranks_split_a_model_and_train_as_one() -> None:
    for rank in run_program(Path(__file__).with_name("ranks.py"), nodes="0000"):
        rank.expect(0)
