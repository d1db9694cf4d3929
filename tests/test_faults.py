"""What a run survives, and how it ends when it does not (cases 14 to 31), on the real command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from core.testing.cli import Outcome, environment, run_cli, run_ranks

ENDLESS = ("workload=toy", "workload.max_epochs=100000", "workload.targets.accuracy=1", "workload.eval.every=100000")
"""A run that only a signal ends; log_seconds is short so that ranks agree on it soon."""
SHORT = ("workload=toy", "stop.steps=20", "checkpoint.every_steps=5")


def start(*arguments: str, run_dir: Path) -> subprocess.Popen[str]:
    """Starts a run and waits until it has trained a few steps."""
    command = [sys.executable, "-m", "core.run", *arguments, f"run_dir={run_dir}", "log_seconds=0.05"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 3:
            return process
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def undisturbed(tmp_path: Path, *arguments: str) -> Outcome:
    return run_cli(*arguments, run_dir=tmp_path / "undisturbed").expect(4)


def test_a_data_set_smaller_than_one_batch_is_an_error(tmp_path: Path) -> None:
    outcome = run_cli("workload=toy", "workload.examples=10", run_dir=tmp_path / "run").expect(1)
    assert "10 examples" in outcome.stderr
    assert outcome.result["error"]["kind"] == "data"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_rank(ranks: int, tmp_path: Path) -> None:
    rank = ranks - 1
    arguments = ("workload=toy", f"launch.nproc={ranks}", "backend=gloo")
    outcome = run_cli(*arguments, run_dir=tmp_path / "run", fault=f"step@7=nan:{rank}").expect(3)
    assert outcome.result["status"] == "diverged"
    assert (outcome.result["error"]["step"], outcome.result["error"]["rank"]) == (7, rank)
    assert outcome.result["time_to_train_s"] is None


def test_a_gradient_that_overflows_is_found_before_it_is_saved(tmp_path: Path) -> None:
    arguments = ("workload=toy", "workload.learning_rate=1e38", "checkpoint.every_steps=1")
    outcome = run_cli(*arguments, run_dir=tmp_path / "run").expect(3)
    assert outcome.result["status"] == "diverged"


def test_a_target_that_is_never_reached_gives_no_time(tmp_path: Path) -> None:
    arguments = ("workload=toy", "workload.targets.accuracy=1", "workload.max_epochs=1")
    outcome = run_cli(*arguments, run_dir=tmp_path / "run").expect(4)
    assert outcome.result["status"] == "not_converged"
    assert outcome.result["time_to_train_s"] is None
    assert "time to train" not in outcome.stdout + outcome.stderr


def test_out_of_memory_names_the_batch_size(tmp_path: Path, fake_plugin) -> None:
    source = """
    class P(Plugin):
        spec = OptSpec(interface=2, summary="made up", numerics="bitwise")
        Config = Config

        @hookimpl(wrapper=True)
        def build_step(self, parts):
            import torch

            yield
            raise torch.OutOfMemoryError("made up")
    """
    site = fake_plugin("opt", "greedy", source)
    outcome = run_cli("workload=toy", "+opt=greedy", run_dir=tmp_path / "run", PYTHONPATH=str(site)).expect(1)
    assert outcome.result["error"]["kind"] == "out_of_memory"
    assert "global batch size 64" in outcome.stderr


def test_an_unexpected_error_is_one_line_with_the_traceback_in_a_file(tmp_path: Path) -> None:
    outcome = run_cli("workload=toy", run_dir=tmp_path / "run", fault="step@3=error").expect(1)
    assert "injected fault" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "Traceback" in (outcome.run_dir / "errors" / "rank0.traceback.txt").read_text()


@pytest.mark.parametrize("number", ["term", "int"])
def test_a_signal_saves_and_the_same_command_resumes_with_the_same_bits(number: str, tmp_path: Path) -> None:
    stopped = run_cli(*SHORT, run_dir=tmp_path / "run", fault=f"step@8={number}").expect(75)
    assert stopped.result["status"] == "stopped"
    resumed = run_cli(*SHORT, run_dir=tmp_path / "run").expect(4)
    assert resumed.result["restarts"] == 1
    assert resumed.result["parameters_sha256"] == undisturbed(tmp_path, *SHORT).result["parameters_sha256"]
    assert resumed.losses == undisturbed_losses(tmp_path)


def undisturbed_losses(tmp_path: Path) -> list[float]:
    return Outcome(4, "", "", "", tmp_path / "undisturbed").losses


def test_a_killed_run_resumes_with_dropout_from_the_same_generator(tmp_path: Path) -> None:
    arguments = (*SHORT, "workload.dropout=0.3")
    assert run_cli(*arguments, run_dir=tmp_path / "run", fault="step@13=kill").code == -signal.SIGKILL
    resumed = run_cli(*arguments, run_dir=tmp_path / "run").expect(4)
    assert resumed.result["parameters_sha256"] == undisturbed(tmp_path, *arguments).result["parameters_sha256"]


def test_a_resumed_success_is_not_scored_unless_asked(tmp_path: Path) -> None:
    for name, more, scored in (("plain", (), False), ("asked", ("score_restarts=true",), True)):
        arguments = ("workload=toy", "workload.targets.accuracy=0.9", "checkpoint.every_steps=1", *more)
        run_cli(*arguments, run_dir=tmp_path / name, fault="step@20=term").expect(75)
        resumed = run_cli(*arguments, run_dir=tmp_path / name).expect(0)
        assert (resumed.result["time_to_train_s"] is not None) == scored
        assert ("time to train" in resumed.stdout) == scored


@pytest.mark.distributed
def test_sigterm_to_the_launcher_stops_two_ranks_together(tmp_path: Path) -> None:
    process = start(*ENDLESS, "launch.nproc=2", "backend=gloo", run_dir=tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 75, errors
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "stopped"
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_twice_leaves_at_once_and_no_process_behind(ranks: int, tmp_path: Path) -> None:
    process = start(*ENDLESS, f"launch.nproc={ranks}", "backend=gloo", "log_seconds=30", run_dir=tmp_path / "run")
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] != "success"


@pytest.mark.distributed
def test_a_killed_rank_is_named_and_no_process_is_left(tmp_path: Path) -> None:
    arguments = ("workload=toy", "launch.nproc=2", "backend=gloo", "checkpoint.every_steps=2")
    outcome = run_cli(*arguments, run_dir=tmp_path / "run", fault="step@9=kill:1").expect(1)
    assert "rank 1" in outcome.stderr
    assert outcome.result["error"]["rank"] == 1
    mine = str(tmp_path / "run")
    assert [p for p in psutil.process_iter(["cmdline"]) if any(mine in a for a in p.info["cmdline"] or [])] == []


OUTER = """
import os

class P(Plugin):
    spec = OptSpec(interface=2, summary="made up", numerics="bitwise")
    Config = Config

    @hookimpl
    def environment(self):
        return {"TIMETRIAL_TEST_ENVY": "1"}

    @hookimpl
    def verify(self, ctx):
        if os.environ.get("TIMETRIAL_TEST_ENVY") != "1" or ctx.rank == FAILING:
            raise RuntimeError(f"rank {ctx.rank} is green")
        return Evidence(plugin="envy", active=True, summary="every rank has the variable")
"""


def outer_launcher(site: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """Two ranks under a torchrun of the user's own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "core.run"]
    arguments = ["workload=toy", "backend=gloo", "+opt=envy", "stop.steps=3", f"run_dir={run_dir}"]
    env = environment(PYTHONPATH=str(site))
    return subprocess.run(
        [*command, *arguments], env=env, cwd=run_dir.parent, capture_output=True, text=True, timeout=120
    )


@pytest.mark.distributed
def test_under_an_outer_launcher_every_rank_has_the_environment_of_the_plugins(tmp_path: Path, fake_plugin) -> None:
    done = outer_launcher(fake_plugin("opt", "envy", OUTER.replace("FAILING", "-1")), tmp_path / "run")
    assert Outcome(4, "", "", "", tmp_path / "run").result["status"] == "not_converged", done.stderr


@pytest.mark.distributed
def test_under_an_outer_launcher_the_failure_of_another_rank_is_recorded(tmp_path: Path, fake_plugin) -> None:
    done = outer_launcher(fake_plugin("opt", "envy", OUTER.replace("FAILING", "1")), tmp_path / "run")
    assert done.returncode != 0
    assert "rank 1 is green" in (tmp_path / "run" / "errors" / "rank1.json").read_text()


@pytest.mark.parametrize("point", ["checkpoint.write", "checkpoint.commit"])
def test_killed_while_saving_the_previous_checkpoint_is_used(point: str, tmp_path: Path) -> None:
    assert run_cli(*SHORT, run_dir=tmp_path / "run", fault=f"{point}@15=kill").code == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")) == [
        "step_00000005",
        "step_00000010",
    ]
    resumed = run_cli(*SHORT, run_dir=tmp_path / "run").expect(4)
    assert resumed.result["parameters_sha256"] == undisturbed(tmp_path, *SHORT).result["parameters_sha256"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_noticed_and_the_previous_one_used(damage, tmp_path: Path) -> None:
    stopped = run_cli(*SHORT, run_dir=tmp_path / "run", fault="step@12=term").expect(75)
    damage(stopped.run_dir / "checkpoints" / "step_00000012" / "shared.safetensors")
    resumed = run_cli(*SHORT, run_dir=tmp_path / "run").expect(4)
    assert "step 12 is damaged" in resumed.stderr
    assert "step 10" in resumed.stderr
    assert resumed.result["parameters_sha256"] == undisturbed(tmp_path, *SHORT).result["parameters_sha256"]


def test_with_every_checkpoint_damaged_the_run_is_refused(tmp_path: Path) -> None:
    stopped = run_cli(*SHORT, run_dir=tmp_path / "run", fault="step@12=term").expect(75)
    for path in stopped.run_dir.glob("checkpoints/*/shared.safetensors"):
        flip_a_bit(path)
    assert "damaged" in run_cli(*SHORT, run_dir=tmp_path / "run").expect(1).stderr


def test_a_pickle_in_place_of_a_checkpoint_is_refused_and_not_executed(tmp_path: Path) -> None:
    import hashlib
    import pickle

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    stopped = run_cli(*SHORT, run_dir=tmp_path / "run", fault="step@12=term").expect(75)
    folder = stopped.run_dir / "checkpoints" / "step_00000012"
    (folder / "shared.safetensors").write_bytes(pickle.dumps(Payload()))
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256((folder / "shared.safetensors").read_bytes()).hexdigest()
    manifest["files"]["shared.safetensors"] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "is not a safetensors file" in run_cli(*SHORT, run_dir=tmp_path / "run").expect(1).stderr
    assert not (tmp_path / "executed").exists()


def test_resuming_with_a_changed_configuration_is_refused_without_a_flag(tmp_path: Path) -> None:
    run_cli(*SHORT, run_dir=tmp_path / "run", fault="step@12=term").expect(75)
    changed = (*SHORT, "workload.learning_rate=0.05")
    refused = run_cli(*changed, run_dir=tmp_path / "run").expect(2)
    assert "workload.learning_rate" in refused.stderr
    resumed = run_cli(*changed, "resume_changed=true", run_dir=tmp_path / "run").expect(4)
    assert (resumed.result["changed"], resumed.result["scored"]) == (True, False)


@pytest.mark.distributed
def test_resuming_with_another_world_size_is_refused_without_a_flag(tmp_path: Path) -> None:
    run_cli(*SHORT, "backend=gloo", run_dir=tmp_path / "run", fault="step@12=term").expect(75)
    two = (*SHORT, "backend=gloo", "launch.nproc=2")
    assert "world size" in run_cli(*two, run_dir=tmp_path / "run").expect(2).stderr
    resumed = run_ranks(*two, "resume_changed=true", run_dir=tmp_path / "run").expect(4)
    assert resumed.result["steps"] == 20
    assert resumed.result["scored"] is False


def test_a_complete_run_is_not_overwritten(tmp_path: Path) -> None:
    first = run_cli("workload=toy", run_dir=tmp_path / "run").expect(0)
    again = run_cli("workload=toy", run_dir=tmp_path / "run").expect(2)
    assert "complete" in again.stderr
    assert again.result == first.result


def test_a_run_folder_that_cannot_be_written_fails_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "run folder" in run_cli("workload=toy", run_dir=tmp_path / "file" / "run", cwd=tmp_path).expect(1).stderr


def test_a_log_that_cannot_be_written_fails_before_training(tmp_path: Path) -> None:
    run_cli(*SHORT, run_dir=tmp_path / "run", fault="step@3=term").expect(75)
    (tmp_path / "run" / "result_0.txt").unlink()
    (tmp_path / "run" / "result_0.txt").mkdir()
    outcome = run_cli(*SHORT, run_dir=tmp_path / "run").expect(1)
    assert "result_0.txt" in outcome.stderr


def test_the_log_of_a_resumed_run_is_that_of_an_undisturbed_one(tmp_path: Path) -> None:
    arguments = ("workload=toy", "workload.targets.accuracy=0.9", "checkpoint.every_steps=3")
    run_cli(*arguments, run_dir=tmp_path / "run", fault="step@20=kill")
    resumed = run_cli(*arguments, run_dir=tmp_path / "run").expect(0)
    whole = run_cli(*arguments, run_dir=tmp_path / "whole").expect(0)
    assert keys(resumed) == keys(whole)


BY_SAMPLES = """
import os, signal
from pathlib import Path
import core.testing.toy
from core.testing.toy.config import ToyConfig
from core.testing.toy.plugin import SPEC, Toy
from core.api.types import EvalCadence
from omegaconf import OmegaConf

class P(Toy):
    Config = Config

    @hookimpl
    def make_workload(self, ctx):
        from core.testing.toy.workload import ToyWorkload

        class Killed(ToyWorkload):
            def evaluate(self, infer):
                marker = Path(os.environ["TIMETRIAL_TEST_KILL"])
                if marker.exists():
                    marker.unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().evaluate(infer)

        values = OmegaConf.load(Path(core.testing.toy.__file__).parent / "conf" / "workload" / "toy.yaml")
        workload = Killed(SPEC, ToyConfig(**values), ctx)
        workload.eval_cadence = EvalCadence(every=640, first=640, unit="samples")
        return workload
"""


def test_killed_between_a_checkpoint_and_its_evaluation_the_evaluation_takes_place(tmp_path: Path, fake_plugin) -> None:
    env = {"PYTHONPATH": str(fake_plugin("workload", "sampled", BY_SAMPLES))}
    env["TIMETRIAL_TEST_KILL"] = str(tmp_path / "kill")
    arguments = ("workload=sampled", "checkpoint.every_steps=10", "stop.steps=35")
    whole = run_cli(*arguments, run_dir=tmp_path / "whole", **env).expect(4)
    (tmp_path / "kill").touch()
    assert run_cli(*arguments, run_dir=tmp_path / "run", **env).code == -signal.SIGKILL
    resumed = run_cli(*arguments, run_dir=tmp_path / "run", **env).expect(4)
    assert keys(resumed) == keys(whole)


def keys(outcome: Outcome) -> list[tuple[str, object]]:
    lines = (outcome.run_dir / "result_0.txt").read_text().splitlines()
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    return [(e["key"], e["value"]) for e in events]
