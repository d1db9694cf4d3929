"""Each plugin works from its wheel beside core's wheel, in a fresh environment outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from core.testing.cli import environment

ROOT = Path(__file__).parent.parent
UV = shutil.which("uv")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wheels of core, one backend and one workload, built from a copy of the checkout's files."""
    if UV is None:
        pytest.skip("uv is not installed")
    out = tmp_path_factory.mktemp("wheels")
    for folder in (".", "plugins/backends/gloo", "plugins/workloads/resnet"):
        command = [UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", str(out)]
        subprocess.run([*command, str(ROOT / folder)], check=True, capture_output=True, cwd=out)
    return sorted(out.glob("*.whl"))


def names(wheels: list[Path], distribution: str) -> list[str]:
    (wheel,) = [path for path in wheels if path.name.startswith(f"{distribution}-")]
    return zipfile.ZipFile(wheel).namelist()


def test_wheels_contain_their_configuration(wheels: list[Path]) -> None:
    assert {"core/conf/config.yaml", "core/conf/data/synthetic.yaml"} <= set(names(wheels, "timetrial"))
    assert "core/testing/toy/conf/workload/toy.yaml" in names(wheels, "timetrial")
    assert "timetrial_gloo/conf/backend/gloo.yaml" in names(wheels, "timetrial_gloo")
    assert "timetrial_resnet/conf/workload/resnet_mlperf.yaml" in names(wheels, "timetrial_resnet")


def test_wheels_run_in_a_fresh_environment_outside_the_checkout(wheels: list[Path], tmp_path: Path) -> None:
    """Third-party packages come from this environment: a .pth entry adds its folder, whose own .pth files, and so the
    editable installs of this checkout, are not read again."""
    venv, python = tmp_path / "venv", tmp_path / "venv" / "bin" / "python"
    assert UV is not None
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, str(venv)], check=True)
    install = [UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(python), *map(str, wheels)]
    subprocess.run(install, check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "third_party.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    env = {key: value for key, value in environment().items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run([str(python), *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import core, timetrial_resnet; print(core.__file__, timetrial_resnet.__file__)")
    assert all(Path(path).is_relative_to(venv) for path in where.split())
    assert "success" in run("-m", "core.run", "workload=toy", "backend=gloo", "run_dir=run")
    assert "throughput" in run(
        "-m", "core.run", "workload=resnet", "workload.width=4", "data=synthetic", "stop.steps=2"
    )
    assert not os.path.exists(site / "conf")
