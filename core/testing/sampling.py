"""A pytest plugin (`-p core.testing.sampling`): `--sample SHARE` keeps a part of the long tests.

It concerns tests marked `matrix` or `convergence`. What a change touches is always kept: tests that are in, or name, a
plugin with recently changed files. Of the others each is kept with probability SHARE, drawn from the commit, so that
one commit always runs the same tests and every test has its turn. Tests marked `unsampled` are always kept.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

RECENT = "12 hours ago"
"""A day's work: what has landed before has been tested by then."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=float, default=1.0, help="share of the convergence and matrix tests to run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unsampled: kept by --sample, whatever the share")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = float(config.getoption("--sample", default=1.0) or 1.0)
    if share >= 1:
        return
    commit, touched = (
        _git("rev-parse", "HEAD"),
        changed_plugins(_git("log", f"--since={RECENT}", "--name-only", "--format=")),
    )
    kept = [item for item in items if not _is_long(item) or is_kept(item.nodeid, commit, touched, share, item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def is_kept(nodeid: str, commit: str, touched: set[str], share: float, item: pytest.Item | None = None) -> bool:
    """Whether a long test runs."""
    if item is not None and item.get_closest_marker("unsampled"):
        return True
    if touched.intersection(re.findall(r"\w+", nodeid)):
        return True
    drawn = int.from_bytes(hashlib.sha256(f"{commit} {nodeid}".encode()).digest()[:8], "big")
    return drawn < share * 2**64


def changed_plugins(listing: str) -> set[str]:
    """Names of the plugins' folders in a list of changed files."""
    paths = (Path(line).parts for line in listing.splitlines())
    return {parts[2] for parts in paths if len(parts) > 3 and parts[0] == "plugins"}


def _is_long(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("matrix", "convergence"))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
