"""Fixtures for tests of plugins, as a pytest plugin (`-p core.testing.fixtures`): a made-up plugin is installed as a
distribution that only the command under test sees."""

from __future__ import annotations

import socket
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

FakePlugin = Callable[..., Path]


@pytest.fixture
def fake_plugin(tmp_path: Path) -> FakePlugin:
    """`fake_plugin(kind, name, source)` writes a distribution; returns the folder to put on PYTHONPATH.

    `source` is the body of its plugin module, which must define `P`; `config_path` is where its `yaml` is.
    """
    site = tmp_path / "site"

    def make(
        kind: str,
        name: str,
        source: str,
        distribution: str | None = None,
        config_path: str | None = None,
        yaml: str = "{}\n",
    ) -> Path:
        distribution = distribution or f"fake-{name}"
        package = f"{distribution}_{name}".replace("-", "_")
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[timetrial.{kind}]\n{name} = {package}.plugin:P\n")
        group = "launch" if kind == "launcher" else kind
        conf = site / package / "conf" / (config_path or f"{group}/{name}.yaml")
        conf.parent.mkdir(parents=True)
        header = f"# @package {kind}.{name}\n" if kind in ("opt", "tracker") else ""
        conf.write_text(header + yaml)
        (site / package / "__init__.py").write_text("")
        (site / package / "plugin.py").write_text(PRELUDE + textwrap.dedent(source))
        return site

    return make


@pytest.fixture
def free_port() -> str:
    """A port where ranks may meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


PRELUDE = """
from dataclasses import dataclass
from core.api.config import LaunchConfig
from core.api.errors import ConflictError, NotOfferedError, UsageError
from core.api.hooks import hookimpl
from core.api.mesh import Dimension
from core.api.seams import LOSS, Seam
from core.api.types import (
    BackendSpec, Command, PluginSpec, Devices, Evidence, Launcher, PluginSpec, OptSpec, Plugin, Ranks, PluginSpec,
)

@dataclass(kw_only=True)
class Config:
    pass
"""
