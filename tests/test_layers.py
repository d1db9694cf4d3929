"""The layers inside core and inside a plugin: files import each other in one direction only."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [ROOT / "core", *sorted(path.parent for path in ROOT.glob("plugins/*/*/src/*/__init__.py"))]


def imports(package: Path) -> dict[str, set[str]]:
    """Module of `package` -> the modules of the package that it imports anywhere: inside a function and under
    TYPE_CHECKING, too, as what can only be read together is one file in two."""
    files: dict[str, Path] = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert not node.level, f"{path}: relative imports are not used here"
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                modules = members & files.keys()
                found |= modules if modules == members else {*modules, node.module}
        graph[name] = (found & files.keys()) - {name}
    return graph


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_files_import_each_other_in_a_circle(package: Path) -> None:
    graph = imports(package)
    assert package.name in graph
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_a_circle_of_type_annotations_is_found(tmp_path: Path) -> None:
    package = tmp_path / "parcel"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("def f():\n    from parcel.two import g\n")
    (package / "two.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from parcel import one\n")
    with pytest.raises(pytest.fail.Exception, match=r"a circle of imports: .*parcel\.one"):
        test_no_files_import_each_other_in_a_circle(package)
