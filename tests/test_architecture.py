"""The laws of CONTRIBUTING.md that no linter knows."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from core.api.hooks import Hooks
from core.compose.composition import compose
from core.compose.discovery import discover
from core.compose.resolve import resolve
from core.testing.imports import brought_along
from core.testing.suites import cached_run

ROOT = Path(__file__).parent.parent
MEMBERS = sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))
PUBLIC_NAMES, HOOKS = 95, 22
"""Most public names of core.api, and most hooks: an interface that a vendor can read in an hour. A third of the names
are types that a plugin only meets in annotations."""


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.splitlines()


def root_project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def public_names() -> dict[str, list[str]]:
    """Module of core.api -> what it declares as public in `__all__`."""
    modules = sorted(path.stem for path in (ROOT / "core" / "api").glob("*.py") if path.stem != "__init__")
    return {name: list(importlib.import_module(f"core.api.{name}").__all__) for name in modules}


def test_the_public_interface_is_small() -> None:
    names = [name for listed in public_names().values() for name in listed]
    assert 40 < len(set(names)) <= PUBLIC_NAMES, len(set(names))
    assert len([name for name in vars(Hooks) if not name.startswith("_")]) <= HOOKS


def test_plugins_import_public_names_alone() -> None:
    """A name that a plugin needs is public, or it is not the plugin's business."""
    public = public_names()
    for path in ROOT.glob("plugins/*/*/src/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("core.api."):
                assert node.module is not None
                allowed = public[node.module.removeprefix("core.api.")]
                assert [alias.name for alias in node.names if alias.name not in allowed] == [], path


def test_the_top_level_holds_what_it_should() -> None:
    allowed = {
        "pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE",
        "core", "plugins", "conf", "tests", "tools", "results",
    }  # fmt: skip
    top = {name.partition("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_no_file_names_a_registry_or_a_machine() -> None:
    words = [
        "pypi" + ".org",
        "python" + "hosted.org",
        "registry." + "npmjs",
        "/" + "work/",
        "/" + "root/",
        "uv" + ".lock\n",
    ]
    allowed = {".gitignore"}
    found = [
        (name, word)
        for name in tracked()
        if name not in allowed and (ROOT / name).suffix in ("", ".py", ".md", ".toml", ".yaml", ".json")
        for word in words
        if (ROOT / name).is_file() and word in (ROOT / name).read_text(errors="replace")
    ]
    assert found == []
    assert "uv.lock" not in tracked()


TORCH_FREE = [
    "core.run", "core.__main__", "core.prepare", "core.plugins", "core.launch.start", "core.launch.local",
    "core.compose.resolve", "core.compose.composition", "core.state.record", "core.state.report",
    *(f"core.api.{name}" for name in (
        "types", "hooks", "seams", "mesh", "config", "errors", "data", "batch", "files", "preparation", "progress",
        "runs", "sidecar", "statistics", "tables", "faults",
    )),
]  # fmt: skip


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_parent_imports_no_torch(module: str) -> None:
    assert brought_along(tuple(TORCH_FREE))[module] == []


def test_help_imports_no_torch_and_shows_what_is_installed() -> None:
    code = (
        "import sys; from core.run import main; sys.argv[1:] = ['--help']; main(); print(*sys.modules, file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch" not in shown.stderr.split()
    assert "resnet_mlperf" in shown.stdout
    assert shown.stdout.count("python -m core.run ") >= 3


def test_every_hook_is_documented() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    for name, hook in vars(Hooks).items():
        if not name.startswith("_"):
            assert hook.__doc__, name
            assert f"`{name}`" in guide, name


def test_seams_import_without_torch() -> None:
    modules = [f"{path.parent.name}.seams" for path in ROOT.glob("plugins/*/*/src/*/seams.py")]
    assert modules
    code = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_core_names_no_plugin_and_no_vendor() -> None:
    names = {member.name for member in MEMBERS if member.parent.name == "opts"} | {"resnet", "nccl", "cuda", "nvidia"}
    for path in (p for p in ROOT.glob("core/**/*.py") if ROOT / "core" / "testing" not in p.parents):
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        quoted = set(re.findall(r"[\"'](\w+)[\"']", code))
        assert not quoted & (names - {"compile"}), path


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_every_plugin_is_a_distribution_named_after_its_folder(member: Path) -> None:
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    assert project["name"] == f"timetrial-{member.name.replace('_', '-')}"
    kind = {"opts": "opt"}.get(member.parent.name, member.parent.name.rstrip("s"))
    assert project["entry-points"][f"timetrial.{kind}"]
    assert (member / "README.md").is_file() and (member / "tests").is_dir()


def test_generated_files_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["result.json"])
def test_a_run_folder_holds_what_the_published_schema_says(name: str) -> None:
    """Of a success, of a run that ended early, and of a failure."""
    schema = json.loads((ROOT / "core" / "state" / "result.schema.json").read_text())
    runs = [
        cached_run("workload=toy").expect(0),
        cached_run("workload=toy", "data=synthetic", "stop.steps=3").expect(0),
        cached_run("workload=toy", "launch.nproc=2", "stop.steps=9").expect(4),
        cached_run("workload=toy", fault="step@9=nan").expect(3),
    ]
    for run in runs:
        jsonschema.validate(json.loads((run.run_dir / name).read_text()), schema)
        assert run.result["hostname"] is None
        assert (run.run_dir / "system.json").is_file()
    finished = set(runs[0].result)
    assert finished == set(schema["properties"]), finished ^ set(schema["properties"])
    assert runs[0].result["started_at"] < runs[0].result["ended_at"]
    assert runs[0].result["targets"] == {"accuracy": {"value": 0.9, "higher_is_better": True}}


def test_core_s_own_code_is_in_the_plan_s_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = discover()
    config, choices = compose(["workload=toy"], registry)
    plan = resolve(config, choices, registry)
    before = plan.hash()
    monkeypatch.setattr("core.compose.plan.core_hash", lambda: "another")
    assert plan.hash() != before
