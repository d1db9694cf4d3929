"""The stand-in for CUDA's recording; see tape.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def tape() -> Any:
    return runpy.run_path(str(Path(__file__).with_name("tape.py")))["Tape"]()
