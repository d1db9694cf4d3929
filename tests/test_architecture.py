"""The laws of CONTRIBUTING.md that no linter knows."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from core.api.hooks import Hooks

ROOT = Path(__file__).parent.parent
MEMBERS = sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))
CORE_LINES = 2500


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.splitlines()


def root_project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_core_is_small() -> None:
    kit = ROOT / "core" / "testing"
    files = [path for path in ROOT.glob("core/**/*.py") if kit not in path.parents]
    assert len(files) > 10
    assert sum(len(path.read_text().splitlines()) for path in files) < CORE_LINES


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


@pytest.mark.parametrize(
    "module",
    [
        "core.run",
        "core.api.hooks",
        "core.api.types",
        "core.api.config",
        "core.compose.discovery",
        "core.compose.resolve",
        "core.launch.start",
    ],
)
def test_the_parent_imports_no_torch(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import sys, {module}; assert 'torch' not in sys.modules"], check=True)


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


def test_core_names_no_plugin_and_no_vendor() -> None:
    names = {member.name for member in MEMBERS if member.parent.name == "opts"} | {"resnet", "nccl", "cuda", "nvidia"}
    for path in ROOT.glob("core/**/*.py"):
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        quoted = set(re.findall(r"[\"'](\w+)[\"']", code))
        assert not quoted & (names - {"compile"}), path


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_every_plugin_is_a_member_named_after_its_folder(member: Path) -> None:
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    name = f"timetrial-{member.name.replace('_', '-')}"
    assert project["name"] == name
    assert member.name in project["entry-points"][f"timetrial.{member.parent.name.rstrip('s')}"]
    assert name in root_project()["dependency-groups"]["dev"]
    assert name in root_project()["tool"]["uv"]["sources"]
    contracts = root_project()["tool"]["importlinter"]
    assert f"timetrial_{member.name}" in contracts["root_packages"]
    assert all(f"timetrial_{member.name}" in str(contract) for contract in contracts["contracts"])


def test_the_readme_lists_every_option() -> None:
    readme = (ROOT / "README.md").read_text()
    for member in MEMBERS:
        points = tomllib.loads((member / "pyproject.toml").read_text())["project"]["entry-points"]
        for options in points.values():
            assert [option for option in options if f"`{option}`" not in readme] == []
