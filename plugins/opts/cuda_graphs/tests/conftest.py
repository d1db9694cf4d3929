"""The stand-ins for CUDA's recording; see tape.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest


def _stand_in(name: str) -> Any:
    return runpy.run_path(str(Path(__file__).with_name("tape.py")))[name]()


@pytest.fixture
def tape() -> Any:
    return _stand_in("Tape")


@pytest.fixture
def pool() -> Any:
    return _stand_in("Pool")
