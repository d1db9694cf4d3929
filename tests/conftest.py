"""Plugins made up for a test: installed as a distribution that only the command under test sees."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

FakePlugin = Callable[..., Path]


@pytest.fixture
def fake_plugin(tmp_path: Path) -> FakePlugin:
    """`fake_plugin(kind, name, source)` writes a distribution; returns the folder to put on PYTHONPATH.

    `source` is the body of its plugin module, which must define `P`; `config_path` is where its YAML lies.
    """
    site = tmp_path / "site"

    def make(
        kind: str, name: str, source: str, distribution: str | None = None, config_path: str | None = None
    ) -> Path:
        distribution = distribution or f"fake-{name}"
        package = f"{distribution}_{name}".replace("-", "_")
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[timetrial.{kind}]\n{name} = {package}.plugin:P\n")
        conf = site / package / "conf" / (config_path or f"{kind}/{name}.yaml")
        conf.parent.mkdir(parents=True)
        conf.write_text(f"# @package opt.{name}\n{{}}\n" if kind == "opt" else "{}\n")
        (site / package / "__init__.py").write_text("")
        (site / package / "plugin.py").write_text(PRELUDE + textwrap.dedent(source))
        return site

    return make


PRELUDE = """
from dataclasses import dataclass
from core.api.hooks import hookimpl
from core.api.types import BackendSpec, Devices, Evidence, OptSpec, Plugin

@dataclass(kw_only=True)
class Config:
    pass
"""
