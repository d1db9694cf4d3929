"""Trackers, launchers and commands from outside: found by entry point, no part of the plan's hash, without a trace in
the numbers. Each is written here as somebody outside the repository would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.testing.cli import Outcome, run_cli, run_fresh, run_raw, run_timetrial
from core.testing.fixtures import FakePlugin

WANDB_LIKE = """
import json

class P(Plugin):
    spec = PluginSpec(interface=2, summary="scalars, configuration and artifacts, as W&B keeps them")
    Config = Config

    def _write(self, ctx, **line):
        if ctx.rank == 0:
            with open(ctx.run_dir / "offline.jsonl", "a") as file:
                print(json.dumps(line), file=file)

    @hookimpl
    def on_run(self, ctx, event, status):
        self._write(ctx, run=event, status=status, seed=ctx.seed)

    @hookimpl
    def on_block(self, ctx, position, event, first_epoch, epochs):
        self._write(ctx, block=event, first_epoch=first_epoch, epochs=epochs)

    @hookimpl
    def on_log(self, ctx, position, values):
        self._write(ctx, step=position.step, **values)

    @hookimpl
    def on_eval(self, ctx, position, done, quality):
        self._write(ctx, step=position.step, done=done, quality=quality)

    @hookimpl
    def on_record(self, ctx, result, artifacts):
        self._write(ctx, record=result["status"], artifacts=sorted(artifacts))
"""

TOY = ("workload=toy", "log_seconds=0.05")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_cli(*TOY, run_dir=tmp_path_factory.mktemp("plain") / "run").expect(0)


def identity(outcome: Outcome) -> tuple[str, str, bool, int]:
    result = outcome.result
    return result["plan_hash"], result["parameters_sha256"], result["scored"], result["steps"]


def test_a_tracker_is_told_everything_and_changes_nothing(
    plain: Outcome, fake_plugin: FakePlugin, tmp_path: Path
) -> None:
    site = str(fake_plugin("tracker", "wandblike", WANDB_LIKE))
    run = run_cli(*TOY, "+tracker=wandblike", run_dir=tmp_path / "run", PYTHONPATH=site).expect(0)
    assert identity(run) == identity(plain)
    assert [t["name"] for t in run.result["trackers"]] == ["mlperf", "wandblike"]
    lines = [json.loads(line) for line in (run.run_dir / "offline.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines if "run" in line] == ["init", "start", "stop"]
    assert [line["block"] for line in lines if "block" in line] == ["start", "stop"] * run.result["epochs"]
    evaluations = [line["quality"] for line in lines if "quality" in line]
    assert evaluations[::2] == [None] * run.result["epochs"] and evaluations[-1] == run.result["quality"]
    assert any("samples_per_s" in line for line in lines)
    assert lines[-1] == {"record": "success", "artifacts": lines[-1]["artifacts"]}
    assert {"result.json", "metrics.jsonl", "checkpoints"} <= set(lines[-1]["artifacts"])


def test_a_tracker_that_is_added_or_left_out_on_the_way_leaves_the_run_unchanged(
    plain: Outcome, fake_plugin: FakePlugin, tmp_path: Path
) -> None:
    site = str(fake_plugin("tracker", "wandblike", WANDB_LIKE))
    arguments = (*TOY, "checkpoint.every_steps=20", "score_restarts=true")
    run_cli(*arguments, run_dir=tmp_path / "run", fault="step@50=kill", PYTHONPATH=site)
    more = ("+tracker=wandblike", "default_trackers=[]", "stop.seconds=500", "log_seconds=0.2", "submission.org=other")
    resumed = run_cli(*arguments, *more, run_dir=tmp_path / "run", PYTHONPATH=site).expect(0)
    assert resumed.result["changed"] is False and resumed.result["restarts"] == 1
    assert identity(resumed) == identity(plain)


def test_a_failed_run_is_told_to_trackers_and_has_a_system_description(fake_plugin: FakePlugin, tmp_path: Path) -> None:
    site = str(fake_plugin("tracker", "wandblike", WANDB_LIKE))
    arguments = (*TOY, "+tracker=wandblike")
    run = run_cli(*arguments, run_dir=tmp_path / "run", fault="step@30=nan", PYTHONPATH=site).expect(3)
    last = json.loads((run.run_dir / "offline.jsonl").read_text().splitlines()[-1])
    assert last == {"run": "failed", "status": "diverged", "seed": 1}
    assert json.loads((run.run_dir / "system.json").read_text())["framework"].startswith("PyTorch")


def test_a_tracker_that_would_change_the_run_is_refused(fake_plugin: FakePlugin, tmp_path: Path) -> None:
    source = """
    class P(Plugin):
        spec = PluginSpec(interface=2, summary="not only a tracker")
        Config = Config

        @hookimpl(wrapper=True)
        def build_step(self):
            return (yield)
    """
    site = str(fake_plugin("tracker", "meddler", source))
    run = run_cli(*TOY, "+tracker=meddler", run_dir=tmp_path / "run", PYTHONPATH=site).expect(2)
    assert "tracker 'meddler'" in run.stderr and "build_step" in run.stderr


LAUNCHER = """
import os
import subprocess

@dataclass(kw_only=True)
class Settings(LaunchConfig):
    note: str

class P(Launcher):
    spec = PluginSpec(interface=2, summary="each rank as a process, started by hand")
    Config = Settings
    config: Settings

    def ranks(self):
        return Ranks(world_size=self.config.nproc, per_node=self.config.nproc)

    def launch(self, job):
        (job.run_dir / "note.txt").write_text(self.config.note)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["TEST_PORT"]}
        size = str(job.ranks.world_size)
        ranks = [
            subprocess.Popen(job.command, env={
                **os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
            })
            for rank in range(job.ranks.world_size)
        ]
        return max(abs(rank.wait()) for rank in ranks)
"""
LAUNCHER_YAML = "nproc: 2\ntimeout_s: 60.0\nenvironment: {}\nnote: by hand\n"


@pytest.mark.distributed
def test_a_launcher_starts_the_ranks_its_own_way_and_leaves_the_plan_as_it_is(
    fake_plugin: FakePlugin, tmp_path: Path, free_port: str
) -> None:
    site = str(fake_plugin("launcher", "byhand", LAUNCHER, yaml=LAUNCHER_YAML))
    usual = run_fresh(*TOY, "launch.nproc=2", "run_dir=usual", cwd=tmp_path, run_dir=tmp_path / "usual").expect(0)
    environment = {"PYTHONPATH": site, "TEST_PORT": free_port}
    arguments = (*TOY, "launch=byhand", "launch.note=mine", "run_dir=other")
    other = run_fresh(*arguments, cwd=tmp_path, run_dir=tmp_path / "other", **environment).expect(0)
    assert identity(other) == identity(usual)
    assert other.result["launcher"]["name"] == "byhand" and other.result["world_size"] == 2
    assert (tmp_path / "other" / "note.txt").read_text() == "mine"


COMMAND = """
class P(Command):
    spec = PluginSpec(interface=2, summary="counts run folders")
    Config = Config

    def run(self, arguments):
        if arguments == ["--help"]:
            print("usage: timetrial count FOLDER")
            return 0
        if not arguments:
            raise UsageError("count needs a folder: timetrial count FOLDER")
        print("folders:", len(arguments))
        return 0
"""


def test_a_command_is_a_word_after_timetrial(fake_plugin: FakePlugin, tmp_path: Path) -> None:
    site = str(fake_plugin("command", "count", COMMAND))
    assert "counts run folders" in run_timetrial("--help", cwd=tmp_path, PYTHONPATH=site).expect(0).stdout
    assert run_timetrial("count", "--help", cwd=tmp_path, PYTHONPATH=site).expect(0).stdout.startswith("usage")
    assert "folders: 2" in run_timetrial("count", "a", "b", cwd=tmp_path, PYTHONPATH=site).expect(0).stdout
    assert run_timetrial("count", cwd=tmp_path, PYTHONPATH=site).expect(2).stderr.startswith("timetrial: count needs")


def test_the_front_door_knows_its_own_commands_and_the_nearest_word(tmp_path: Path) -> None:
    assert "did you mean 'plugins'?" in run_timetrial("plugin", cwd=tmp_path).expect(2).stderr
    assert "usage: timetrial prepare" in run_timetrial("prepare", "--help", cwd=tmp_path).expect(0).stdout
    assert "groups and installed options" in run_timetrial("run", "--help", cwd=tmp_path).expect(0).stdout
    assert "mlperf" in run_timetrial("plugins", cwd=tmp_path).expect(0).stdout
    done = run_timetrial("workload=toy", f"run_dir={tmp_path / 'run'}", cwd=tmp_path).expect(0)
    assert "success" in done.stdout


def test_a_default_tracker_that_is_not_installed_is_named(tmp_path: Path) -> None:
    run = run_raw("workload=toy", "default_trackers=[mlprf]", f"run_dir={tmp_path / 'run'}", cwd=tmp_path).expect(2)
    assert "did you mean 'mlperf'?" in run.stderr
