"""`python -m core.prepare`: the same bytes each time, also after a kill; bad inputs and damaged results are named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.api.errors import DataError
from core.api.preparation import check_manifest
from core.testing.cli import environment

WORKLOAD = """
import os, signal, time
from core.api.types import WorkloadSpec

def shout(path, source, kill):
    if kill and os.path.exists(kill):
        os.unlink(kill)
        os.kill(os.getppid() if os.environ["WORKERS"] == "1" else os.getpid(), signal.SIGKILL)
    text = open(source).read()
    path.write_text(text.upper())
    return {"bad": not text, "letters": len(text)}

def paced(jobs):
    for job in jobs:
        yield job
        time.sleep(float(os.environ.get("PAUSE", 0)))

class P(Plugin):
    spec = WorkloadSpec(interface=2, summary="made up", benchmark="bert")
    Config = Config

    @hookimpl
    def prepare(self, preparation):
        files = sorted(preparation.source.iterdir())
        kill = os.environ.get("KILL", "")
        jobs = [(f"loud/{f.name}", (str(f), kill if f.name == "3.txt" else "")) for f in files]
        notes = preparation.map("shouting", shout, paced(jobs))
        for f, note in zip(files, notes):
            if note["bad"]:
                preparation.refuse(str(f), "is empty")
        return {"letters": sum(note["letters"] for note in notes)}
"""


@pytest.fixture
def command(tmp_path: Path, fake_plugin):
    """Runs the preparation of a made-up workload from six small files; returns exit status, stdout and stderr."""
    site = fake_plugin("workload", "loud", WORKLOAD)
    source = tmp_path / "source"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.txt").write_text(f"text number {number}")

    def run(out: str, *more: str, workers: int = 0, **env: str) -> tuple[int, str, str]:
        arguments = ["workload=loud", f"source={source}", f"out={tmp_path / out}", f"data.workers={workers}", *more]
        env = environment(PYTHONPATH=str(site), WORKERS=str(workers), **env)
        done = subprocess.run(
            [sys.executable, "-m", "core.prepare", *arguments], env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_bytes_do_not_depend_on_the_number_of_workers(command, tmp_path: Path) -> None:
    assert command("one")[0] == 0
    code, shown, _ = command("two", workers=2)
    assert (code, "78 letters" in shown) == (0, True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(json.loads((tmp_path / "one" / "manifest.json").read_text())["files"]) == {
        f"loud/{number}.txt" for number in range(6)
    }


def test_killed_in_the_middle_the_same_command_continues_to_the_same_bytes(command, tmp_path: Path) -> None:
    (tmp_path / "kill").touch()
    code, _, _ = command("killed", KILL=str(tmp_path / "kill"))
    assert code == -signal.SIGKILL
    first = (tmp_path / "killed" / "loud" / "0.txt").stat().st_mtime_ns
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert command("killed")[0] == 0
    assert (tmp_path / "killed" / "loud" / "0.txt").stat().st_mtime_ns == first
    assert command("whole")[0] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("pause", ["0", "0.5"], ids=["while it is waited for", "before the last jobs are there"])
def test_a_killed_worker_is_said_in_one_line_and_the_same_command_continues(command, pause, tmp_path: Path) -> None:
    (tmp_path / "kill").touch()
    code, _, errors = command("out", workers=2, KILL=str(tmp_path / "kill"), PAUSE=pause)
    assert code == 1
    assert "worker process was killed" in errors
    assert "Traceback" not in errors
    assert command("out", workers=2)[0] == 0


def test_a_bad_input_is_named_and_refused_unless_allowed(command, tmp_path: Path) -> None:
    (tmp_path / "source" / "2.txt").write_text("")
    code, _, errors = command("out")
    assert code == 1
    assert "2.txt: is empty" in errors
    code, shown, _ = command("out", "data.max_bad=1")
    assert (code, "1 bad" in shown) == (0, True)


def test_another_source_or_other_settings_are_refused_for_the_same_folder(command, tmp_path: Path) -> None:
    assert command("out")[0] == 0
    assert command("out")[0] == 0
    assert command("out", "seed=2")[0] == 2
    (tmp_path / "source" / "9.txt").write_text("more")
    assert command("out")[0] == 2


def test_a_damaged_result_is_named(command, tmp_path: Path) -> None:
    assert command("out")[0] == 0
    check_manifest(tmp_path / "out", "loud")
    (tmp_path / "out" / "loud" / "4.txt").write_text("quiet")
    check_manifest(tmp_path / "out", "loud", rank=0, world_size=6)
    with pytest.raises(DataError, match=r"4\.txt has changed"):
        check_manifest(tmp_path / "out", "loud")
    (tmp_path / "out" / "loud" / "4.txt").unlink()
    with pytest.raises(DataError, match=r"4\.txt is missing.*core\.prepare workload=loud"):
        check_manifest(tmp_path / "out", "loud")


def test_what_cannot_be_prepared_is_refused(command, tmp_path: Path) -> None:
    for arguments, said in (
        (["workload=toy", "source=.", f"out={tmp_path / 'x'}"], "needs no preparation"),
        (["workload=loudd", "source=.", "out=x"], "not installed"),
        (["source=.", "out=x"], "usage"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "core.prepare", *arguments], env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
