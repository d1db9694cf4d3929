"""Each plugin works from its wheel beside core's wheel, in a fresh environment outside the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from core.testing.cli import environment

ROOT = Path(__file__).parent.parent
UV = shutil.which("uv")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wheels of core and of what the default command needs."""
    if UV is None:
        pytest.skip("uv is not installed")
    out = tmp_path_factory.mktemp("wheels")
    needed = ("backends/torchdist", "opts/ddp", "trackers/mlperf", "workloads/resnet")
    return build([ROOT, *(ROOT / "plugins" / folder for folder in needed)], out)


def build(folders: list[Path], out: Path) -> list[Path]:
    assert UV is not None
    command = [UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", str(out)]
    for folder in folders:
        subprocess.run([*command, str(folder)], check=True, capture_output=True, cwd=out)
    return sorted(out.glob("*.whl"))


def names(wheels: list[Path], distribution: str) -> list[str]:
    (wheel,) = [path for path in wheels if path.name.startswith(f"{distribution}-")]
    return zipfile.ZipFile(wheel).namelist()


def test_wheels_contain_their_configuration(wheels: list[Path]) -> None:
    assert {"core/conf/config.yaml", "core/conf/data/synthetic.yaml"} <= set(names(wheels, "timetrial"))
    assert "core/testing/toy/conf/workload/toy.yaml" in names(wheels, "timetrial")
    assert {"core/state/result.schema.json", "core/api/MIGRATION.md"} <= set(names(wheels, "timetrial"))
    assert "timetrial_torchdist/conf/backend/gloo.yaml" in names(wheels, "timetrial_torchdist")
    assert "timetrial_resnet/conf/workload/resnet_mlperf.yaml" in names(wheels, "timetrial_resnet")


def installed(wheels: list[Path], venv: Path) -> Callable[..., str]:
    """A fresh environment with these wheels; returns what runs its Python and gives stdout.

    Third-party packages come from this environment: a .pth entry adds its folder, whose own .pth files, and so the
    editable installs of this checkout, are not read again.
    """
    assert UV is not None
    python = venv / "bin" / "python"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, str(venv)], check=True)
    install = [UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(python), *map(str, wheels)]
    subprocess.run(install, check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "third_party.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert not (site / "conf").exists()
    env = {key: value for key, value in environment().items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run([str(python), *arguments], cwd=venv.parent, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_wheels_run_in_a_fresh_environment_outside_the_checkout(wheels: list[Path], tmp_path: Path) -> None:
    run = installed(wheels, tmp_path / "venv")
    where = run("-c", "import core, timetrial_resnet; print(core.__file__, timetrial_resnet.__file__)")
    assert all(Path(path).is_relative_to(tmp_path / "venv") for path in where.split())
    assert "success" in run("-m", "core.run", "workload=toy", "backend=gloo", "run_dir=run")
    assert "success" in run("-m", "core", "workload=toy", "launch.nproc=2", "run_dir=two")
    assert "throughput" in run(
        "-m", "core.run", "workload=resnet", "workload.width=4", "data=synthetic", "stop.steps=2"
    )


@pytest.mark.convergence
def test_every_distribution_builds_installs_and_runs_from_its_wheel(tmp_path: Path) -> None:
    """Each option of each plugin composes and is loaded; those that this machine can run say so."""
    if UV is None:
        pytest.skip("uv is not installed")
    members = sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))
    (out := tmp_path / "wheels").mkdir()
    run = installed(build([ROOT, *members], out), tmp_path / "venv")
    listing = run("-c", LISTING)
    loaded = dict(line.split(maxsplit=1) for line in listing.splitlines())
    assert len(loaded) > len(members)
    assert {name: why for name, why in loaded.items() if why != "loaded"} == {}
    assert "success" in run("-m", "core", "workload=toy", "launch.nproc=2", "+opt=[fsdp,activation_checkpointing]")


LISTING = """
from pathlib import Path
import sys
from core.compose.discovery import discover
for plugin in discover().plugins:
    assert plugin.package_dir.is_relative_to(sys.prefix), plugin
    assert plugin.kind in ("command", "launcher") or plugin.conf_file.is_file(), plugin
    try:
        plugin.load()
        print(plugin.kind + "." + plugin.name, "loaded")
    except Exception as error:
        print(plugin.kind + "." + plugin.name, error)
"""
