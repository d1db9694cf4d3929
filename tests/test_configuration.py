"""What is refused before anything starts (cases 1 to 13 of the faults a run must survive), on the real command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from core.testing.cli import Outcome, environment, run_cli, run_ranks, run_raw

OPT = """
class P(Plugin):
    spec = OptSpec(interface=2, summary="made up", numerics="bitwise"{more})
    Config = Config
"""


def refused(*arguments: str, tmp_path: Path, code: int = 2, **env: str) -> str:
    """Runs the command, checks that it failed with one line and without a run folder, and returns that line."""
    outcome = run_cli(*arguments, run_dir=tmp_path / "run", **env).expect(code)
    lines = outcome.stderr.strip().splitlines()
    assert len(lines) == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "run").exists()
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("workload=tyo",), "did you mean 'toy'?"),
        (("workload=toy", "backend=glo"), "did you mean 'gloo'?"),
        (("workload=toy", "+opt=apm"), "did you mean 'amp'?"),
        (("workload=toy", "experiment=resnet_fsat"), "did you mean 'resnet_fast'?"),
        (("workload=toy", "+opt=cuda_graph_nonsense"), "installed: activation_checkpointing, amp"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest_one(
    arguments: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    assert expected in refused(*arguments, tmp_path=tmp_path)


@pytest.mark.parametrize(
    "override", ["workload.global_batchsize=3", "+workload.global_batchsize=3", "++workload.global_batchsize=3"]
)
def test_a_misspelt_key_is_refused_also_when_it_is_added(override: str, tmp_path: Path) -> None:
    line = refused("workload=toy", override, tmp_path=tmp_path)
    assert "global_batchsize" in line
    assert "global_batch_size" in line


def test_a_misspelt_key_that_is_added_elsewhere_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    assert "did you mean 'steps'?" in refused("workload=toy", "+stop.stps=1", tmp_path=tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "workload.learning_rate=nan", "workload.learning_rate=0", "workload.learning_rate=-1", "workload.momentum=1.5",
        "workload.max_epochs=many", "launch.nproc=0", "stop.seconds=inf", "data.max_bad=-1", "seed=-1", "seed=abc",
        "checkpoint.keep=1", "submission.division=half",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_and_named(override: str, tmp_path: Path) -> None:
    assert override.partition("=")[0] in refused("workload=toy", override, tmp_path=tmp_path)


def test_one_opt_twice_is_refused(tmp_path: Path) -> None:
    assert "'amp'" in refused("workload=toy", "+opt=[amp,amp]", tmp_path=tmp_path)
    assert "opt" in refused("workload=toy", "opt=amp", "+opt=amp", tmp_path=tmp_path)


def test_opts_that_conflict_are_refused_with_the_reason(tmp_path: Path, fake_plugin) -> None:
    fake_plugin("opt", "one", OPT.format(more=', conflicts={"two": "both replace the loss"}'))
    site = fake_plugin("opt", "two", OPT.format(more=""))
    line = refused("workload=toy", "+opt=[two,one]", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert all(part in line for part in ("'one'", "'two'", "both replace the loss"))


def test_opts_that_claim_the_same_resource_are_refused(tmp_path: Path, fake_plugin) -> None:
    for name in ("one", "two"):
        site = fake_plugin("opt", name, OPT.format(more=', claims=frozenset({"gradient_exchange.hook"})'))
    line = refused("workload=toy", "+opt=[one,two]", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert all(part in line for part in ("'one'", "'two'", "gradient_exchange.hook"))


def test_an_opt_whose_seam_is_not_offered_is_refused(tmp_path: Path, fake_plugin) -> None:
    site = fake_plugin("opt", "lean", OPT.format(more=', replaces=frozenset({Seam("rnnt.loss")})'))
    outcome = run_cli("workload=toy", "+opt=lean", run_dir=tmp_path / "run", PYTHONPATH=str(site)).expect(2)
    assert "rnnt.loss" in outcome.stderr
    assert outcome.failure == "not_offered"


def test_an_opt_that_replaces_a_seam_without_saying_so_is_refused(tmp_path: Path, fake_plugin) -> None:
    source = (
        OPT.format(more="")
        + """
    @hookimpl
    def replace(self):
        return [LOSS.by(lambda inner: inner)]
"""
    )
    site = fake_plugin("opt", "silent", source)
    outcome = run_cli("workload=toy", "+opt=silent", run_dir=tmp_path / "run", PYTHONPATH=str(site)).expect(2)
    assert "core.loss" in outcome.stderr and outcome.failure == "plugin"


def test_what_check_refuses_is_refused_before_a_run_folder_exists(tmp_path: Path, fake_plugin) -> None:
    source = (
        OPT.format(more="")
        + """
    @hookimpl
    def check(self, plan):
        raise ConflictError(f"opts {', '.join(plan.opts)} on {plan.workload} with {plan.world_size} ranks do not go")
"""
    )
    site = fake_plugin("opt", "picky", source)
    line = refused("workload=toy", "+opt=[picky,amp]", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert "opts amp, picky on toy with 1 ranks do not go" in line


def test_a_new_mesh_dimension_needs_no_change_to_core(tmp_path: Path, fake_plugin) -> None:
    """Ranks along a made-up dimension share their data: 2 x 2 ranks read as two data ranks do, and count once."""
    source = (
        OPT.format(more=', requires=frozenset({"multi_rank"})')
        + """
    @hookimpl
    def dimensions(self):
        return [Dimension(name="twin", size=2, splits_data=False, nearness=40, reports="last")]

    @hookimpl
    def verify(self, ctx):
        return Evidence(plugin="twins", active=ctx.mesh.size("twin") == 2, summary="two of each")
"""
    )
    site = str(fake_plugin("opt", "twins", source))
    toy = ("workload=toy", "stop.steps=40")
    four = run_ranks(*toy, "+opt=twins", "launch.nproc=4", run_dir=tmp_path / "four", PYTHONPATH=site).expect(4)
    two = run_ranks(*toy, "launch.nproc=2", run_dir=tmp_path / "two").expect(4)
    assert four.result["mesh"] == {"data": 2, "twin": 2}
    for key in ("parameters_sha256", "quality", "samples"):
        assert four.result[key] == two.result[key], key
    assert four.losses == two.losses
    line = refused("workload=toy", "+opt=twins", "launch.nproc=3", tmp_path=tmp_path, PYTHONPATH=site)
    assert "3 ranks cannot be arranged as twin 2" in line


def test_a_workload_whose_requirement_is_not_met_is_refused(tmp_path: Path, fake_plugin) -> None:
    source = """
    from core.api.types import WorkloadSpec

    class P(Plugin):
        spec = WorkloadSpec(interface=2, summary="made up", benchmark="bert", requires=frozenset({"multi_rank"}))
        Config = Config
    """
    site = fake_plugin("workload", "wide", source)
    line = refused("workload=wide", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert all(part in line for part in ("workload 'wide'", "multi_rank", "launch.nproc=2"))


def test_a_plugin_that_fails_to_import_is_fatal_only_if_chosen(tmp_path: Path, fake_plugin) -> None:
    site = fake_plugin("opt", "broken", "import there_is_no_such_module\n")
    assert "fake-broken" in refused("workload=toy", "+opt=broken", tmp_path=tmp_path, PYTHONPATH=str(site))
    run_cli("workload=toy", "stop.steps=2", run_dir=tmp_path / "run", PYTHONPATH=str(site)).expect(4)
    listing = subprocess.run(
        [sys.executable, "-m", "core.plugins"], capture_output=True, text=True, env=environment(PYTHONPATH=str(site))
    )
    assert listing.returncode == 0
    assert "there_is_no_such_module" in listing.stdout.replace("\n", "")


def test_two_distributions_with_one_plugin_name_are_refused(tmp_path: Path, fake_plugin) -> None:
    site = fake_plugin("opt", "amp", OPT.format(more=""), distribution="impostor")
    line = refused("workload=toy", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert "impostor" in line
    assert "timetrial-amp" in line


def test_two_distributions_with_one_configuration_path_are_refused(tmp_path: Path, fake_plugin) -> None:
    site = fake_plugin("opt", "other", OPT.format(more=""), distribution="impostor", config_path="opt/amp.yaml")
    line = refused("workload=toy", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert all(part in line for part in ("impostor", "timetrial-amp", "opt/amp.yaml"))


@pytest.mark.parametrize("flag", [["--no-plugin", "noisy"], ["--only-plugins", "toy,gloo"]])
def test_a_blocked_plugin_is_never_imported(flag: list[str], tmp_path: Path, fake_plugin) -> None:
    trace = tmp_path / "imported"
    site = fake_plugin("opt", "noisy", f"open({str(trace)!r}, 'w')\n" + OPT.format(more=""))
    line = refused(*flag, "workload=toy", "+opt=noisy", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert "noisy" in line
    assert not trace.exists()


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        ("def prepare_modle(self, ctx, model): ...", "prepare_modle"),
        ("def prepare_model(self, network): ...", "network"),
    ],
)
def test_a_hook_that_does_not_fit_the_interface_is_refused(hook: str, named: str, tmp_path: Path, fake_plugin) -> None:
    site = fake_plugin("opt", "odd", OPT.format(more="") + f"\n    @hookimpl\n    {hook}\n")
    assert named in refused("workload=toy", "+opt=odd", tmp_path=tmp_path, PYTHONPATH=str(site))


def test_a_plugin_for_another_interface_is_refused_with_both_versions(tmp_path: Path, fake_plugin) -> None:
    site = fake_plugin("opt", "old", OPT.format(more="").replace("interface=2", "interface=99"))
    line = refused("workload=toy", "+opt=old", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert "interface 99" in line
    assert "interface 2" in line


def test_nccl_without_a_gpu_says_what_to_use(tmp_path: Path) -> None:
    from timetrial_torchdist.nccl import Nccl

    if not Nccl.spec.probe().problem:
        pytest.skip("this machine has a GPU")
    assert "backend=gloo" in refused("workload=toy", "backend=nccl", tmp_path=tmp_path)


def test_fewer_devices_than_ranks_is_refused_before_a_process_starts(tmp_path: Path, fake_plugin) -> None:
    source = """
    class P(Plugin):
        spec = BackendSpec(interface=2, summary="made up", probe=lambda: Devices(count=1))
        Config = Config
    """
    site = fake_plugin("backend", "narrow", source)
    line = refused("workload=toy", "backend=narrow", "launch.nproc=2", tmp_path=tmp_path, PYTHONPATH=str(site))
    assert "launch.nproc=1" in line
    assert "1 of 2 ranks" in refused("workload=toy", "backend=single", "launch.nproc=2", tmp_path=tmp_path)


@pytest.mark.parametrize("ranks", ["backend=single", "launch.nproc=2"])
def test_the_ranks_see_variables_of_the_configuration(ranks: str, tmp_path: Path) -> None:
    fault = "+launch.environment.TIMETRIAL_FAULT='step@2=error'"
    assert "injected fault" in run_cli("workload=toy", ranks, fault, run_dir=tmp_path / "run").expect(1).stderr


def test_runs_started_together_get_folders_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "core.run", "workload=toy", "stop.steps=1"]
    runs = [subprocess.Popen(command, cwd=tmp_path, env=environment()) for _ in range(2)]
    assert [run.wait(120) for run in runs] == [4, 4]
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("sweep")
    rates = "workload.learning_rate=0.1,-1"
    return run_raw("-m", "workload=toy", rates, "opt=[],grad_accumulation", cwd=folder, run_dir=folder)


def test_a_sweep_goes_on_after_a_failed_job_and_ends_with_a_table(sweep: Outcome) -> None:
    sweep.expect(1)
    assert "not successful: 2, 3" in sweep.stdout
    assert sweep.stdout.count("success:") == 2
    assert "workload.learning_rate=-1" in sweep.stdout


def test_each_job_of_a_sweep_has_its_result_in_one_folder(sweep: Outcome) -> None:
    (folder,) = (sweep.run_dir / "runs").iterdir()
    status = [json.loads((folder / str(job) / "result.json").read_text())["status"] for job in range(4)]
    assert status == ["success", "success", "failed", "failed"]


def test_rerunning_a_pickle_is_refused(tmp_path: Path) -> None:
    outcome = run_raw("--experimental-rerun", "job.pickle", cwd=tmp_path).expect(2)
    assert "pickle" in outcome.stderr


def test_a_secret_from_the_environment_is_written_to_no_file(tmp_path: Path) -> None:
    outcome = run_cli(
        "workload=toy", "stop.steps=2", "submission.org=${oc.env:TIMETRIAL_TEST_SECRET}", run_dir=tmp_path / "run",
        TIMETRIAL_TEST_SECRET="hunter2",
    ).expect(4)  # fmt: skip
    plan = (outcome.run_dir / "resolved.yaml").read_text()
    assert "hunter2" not in plan
    assert "${oc.env:TIMETRIAL_TEST_SECRET}" in plan


def test_the_order_of_opts_does_not_matter(tmp_path: Path) -> None:
    plans = []
    for number, order in enumerate(("[amp,grad_accumulation]", "[grad_accumulation,amp]")):
        run = run_cli("workload=toy", f"+opt={order}", "stop.steps=3", run_dir=tmp_path / str(number)).expect(4)
        plans.append((run.result["plan_hash"], run.result["plugins"], run.result["parameters_sha256"]))
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("workload.targets.box_ap=1.5", "workload.targets.box_ap=1.5 is out of range; at most 1 is expected"),
        ("workload.targets.mask_ap=nan", "workload.targets.mask_ap is nan"),
        ("~workload.targets.mask_ap", "workload.targets.mask_ap is missing"),
        ("+workload.targets.mask_iou=0.5", "unknown key 'workload.targets.mask_iou': did you mean 'mask_ap'?"),
        ("workload.targets.mask_iou=0.5", "unknown key 'workload.targets.mask_iou': did you mean 'mask_ap'?"),
        ("workload.eval.first=0", "workload.eval.first=0 is out of range; at least 1 is expected"),
        ("workload.eval.unit=epoch", "workload.eval.unit=epoch: did you mean 'epochs'?"),
    ],
)
def test_an_invalid_target_or_evaluation_is_refused(override: str, expected: str, tmp_path: Path) -> None:
    assert expected in refused("workload=maskrcnn", override, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("workload", "remedy"),
    [
        ("bert_mlperf", "core.prepare workload=bert_mlperf"),
        ("rnnt_mlperf", "core.prepare workload=rnnt_mlperf"),
        ("maskrcnn_mlperf", "core.prepare workload=maskrcnn_mlperf"),
        ("resnet_mlperf", "train/<class>/*.jpg"),
    ],
)
def test_a_workload_without_data_is_refused_before_it_starts(workload: str, remedy: str, tmp_path: Path) -> None:
    line = refused(f"workload={workload}", tmp_path=tmp_path)
    assert "data.root is not set" in line
    assert remedy in line
