"""Whole runs: on a tape (see tape.py), and refused where there is no CUDA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest

from core.api.config import validate
from core.api.errors import ConflictError, NotHereError, NotOfferedError, UsageError
from core.api.hooks import PROJECT, Hooks, hookimpl
from core.api.types import Capture, WorkloadSpec
from core.testing.cli import Outcome, run_cli, run_program
from timetrial_cuda_graphs.plugin import CudaGraphs, CudaGraphsConfig

STEP, PARTS = Capture(step=True), Capture(parts=("encoder",))
CONFIG: dict[str, Any] = {"eager_steps": 11, "max_graphs": 8, "max_shapes": 16, "inference": True}


def run_on_tape(*overrides: str, run_dir: Path) -> Outcome:
    (outcome,) = run_program(Path(__file__).with_name("tape.py"), *overrides, f"run_dir={run_dir}", nodes="0")
    return replace(outcome, run_dir=run_dir)


TOY = (
    "workload=toy", "workload.dropout=0.3", "workload.examples=232", "workload.eval.every=1",
    "stop.epochs=6", "workload.targets.accuracy=1.0",
)  # fmt: skip


def test_a_run_with_graphs_ends_with_the_bits_of_the_eager_run(tmp_path: Path) -> None:
    opts = "+opt=[cuda_graphs,fused_optimizer]"  # the same optimizer in both
    eager = run_cli(*TOY, "backend=single", "+opt=fused_optimizer", run_dir=tmp_path / "eager").expect(4)
    graphs = run_on_tape(*TOY, "backend=single", opts, run_dir=tmp_path / "graphs").expect(4)
    assert graphs.result["parameters_sha256"] == eager.result["parameters_sha256"]
    assert graphs.losses == eager.losses
    assert graphs.result["quality"] == eager.result["quality"]
    evidence = graphs.evidence["cuda_graphs"]
    assert evidence["active"]
    assert evidence["numerics"] == "bitwise"
    train, infer = evidence["figures"]["train"], evidence["figures"]["infer"]
    assert train["replays"] + sum(train["eager"].values()) == graphs.result["steps"]
    assert train["captured"] == 2  # full batches, and the last one of an epoch
    assert infer["replays"] > 0


@pytest.mark.convergence
def test_a_resumed_run_ends_with_the_bits_of_the_undisturbed_one(tmp_path: Path) -> None:
    arguments = (*TOY, "backend=single", "+opt=cuda_graphs", "checkpoint.every_steps=20")
    whole = run_on_tape(*arguments, "stop.steps=40", run_dir=tmp_path / "whole").expect(4)
    run_on_tape(*arguments, "stop.steps=20", run_dir=tmp_path / "parts").expect(4)
    parts = run_on_tape(*arguments, "stop.steps=40", run_dir=tmp_path / "parts").expect(4)
    assert parts.result["restarts"] == 1
    assert parts.result["parameters_sha256"] == whole.result["parameters_sha256"]


@pytest.mark.parametrize(
    ("backend", "opts"),
    [
        (("backend=single", "opt.grad_accumulation.steps=2"), "amp,fused_optimizer,grad_accumulation"),
        (("backend=gloo",), "ddp,fused_optimizer,stream_overlap"),
    ],
    ids=["amp and accumulation", "ddp and overlap"],
)
def test_what_other_opts_do_lies_inside_the_graph(backend: tuple[str, ...], opts: str, tmp_path: Path) -> None:
    arguments = (*TOY, *backend, "stop.steps=24")
    eager = run_cli(*arguments, f"+opt=[{opts}]", run_dir=tmp_path / "eager").expect(4)
    graphs = run_on_tape(*arguments, f"+opt=[{opts},cuda_graphs]", run_dir=tmp_path / "graphs").expect(4)
    assert graphs.losses == eager.losses
    assert graphs.result["parameters_sha256"] == eager.result["parameters_sha256"]
    assert graphs.evidence["cuda_graphs"]["figures"]["train"]["replays"] > 10
    assert all(evidence["active"] for evidence in graphs.evidence.values())


@pytest.mark.convergence
def test_parts_are_captured_for_the_shapes_that_the_workload_names(tmp_path: Path) -> None:
    """An epoch of rnnt. T of a batch is a multiple of 8: first that of its synthetic batch, 56, then those from 96,
    what its longest utterance can have, downwards."""
    small = ("workload.encoder_hidden=16", "workload.predictor_hidden=8", "workload.joint_hidden=16")
    arguments = ("workload=rnnt", *small, "workload.global_batch_size=128", "workload.eval.first=2", "stop.epochs=1")
    settings = ("backend=single", "+opt=cuda_graphs", "opt.cuda_graphs.max_shapes=7")
    eager = run_cli(*arguments, "backend=single", run_dir=tmp_path / "eager").expect(4)
    graphs = run_on_tape(*arguments, *settings, run_dir=tmp_path / "graphs").expect(4)
    assert graphs.losses == eager.losses
    assert graphs.result["parameters_sha256"] == eager.result["parameters_sha256"]
    replays, eager_calls = graphs.evidence["cuda_graphs"]["figures"]["encoder"].values()
    assert list(replays) == [f"128x{frames}x240" for frames in (56, 96, 88, 80, 72, 64, 48)]
    assert sum(count > 0 for count in replays.values()) > 1
    last, *shorter = sorted(eager_calls, key=lambda shape: not shape.startswith(f"{1780 % 128}x"))
    assert eager_calls[last] == 1
    assert shorter
    assert set(shorter) <= {"128x40x240", "128x32x240"}
    warm_up = 1
    assert sum(replays.values()) + sum(eager_calls.values()) == graphs.result["steps"] + warm_up


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("arguments", [("workload=toy", "backend=gloo"), ("workload=resnet", "backend=nccl")])
def test_without_cuda_it_is_refused_at_once_in_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    refused = run_cli(*arguments, "+opt=cuda_graphs", run_dir=tmp_path / "run", CUDA_VISIBLE_DEVICES="").expect(2)
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def hooks(*inner: Any) -> Any:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    for plugin in (*inner, CudaGraphs(CudaGraphsConfig(**CONFIG))):
        manager.register(plugin)
    return manager.hook


class Given:
    """A workload that says how much of its step can be captured, on a CPU."""

    def __init__(self, capture: Capture) -> None:
        spec = WorkloadSpec(interface=2, summary="", benchmark="minigo")
        self.workload = SimpleNamespace(spec=spec, capture=capture, example_batches=lambda: iter("x"))

    @hookimpl
    def make_workload(self) -> Any:
        return self.workload

    @hookimpl
    def distribute(self, model: Any) -> Any:
        return model

    @hookimpl
    def init_backend(self) -> Any:
        return SimpleNamespace(device=SimpleNamespace(type="cpu"))


def test_a_workload_that_cannot_be_captured_is_refused() -> None:
    with pytest.raises(NotOfferedError, match="no part of a step of minigo can be captured"):
        hooks(Given(Capture())).make_workload(ctx=None)
    for some in (STEP, PARTS):
        assert hooks(Given(some)).make_workload(ctx=None).capture == some


def test_a_run_on_the_cpu_of_a_machine_with_cuda_is_refused() -> None:
    with pytest.raises(NotHereError, match="needs a CUDA device, but this run is on the cpu"):
        hooks(Given(STEP)).init_backend(ctx=None)


@pytest.mark.parametrize("opt", ["compile", "grad_accumulation"])
def test_what_a_partly_captured_model_does_not_allow_is_refused(opt: str) -> None:
    given = Given(PARTS)
    ctx = SimpleNamespace(workload=given.workload, config=SimpleNamespace(opt={opt: {}}))
    with pytest.raises(ConflictError, match=f"'{opt}' and 'cuda_graphs' conflict"):
        hooks(given).distribute(ctx=ctx, model=None)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match=r"opt.cuda_graphs.eager_steps=0"):
        validate(CudaGraphsConfig, {**CONFIG, "eager_steps": 0}, "opt.cuda_graphs")


def test_ddp_with_too_few_warm_up_steps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", nn.Sequential)
    plugin = CudaGraphs(CudaGraphsConfig(**{**CONFIG, "eager_steps": 10}))
    ctx: Any = SimpleNamespace(distributed_model=nn.Sequential(), workload=Given(STEP).workload)
    with pytest.raises(UsageError, match="at least 11 eager steps"):
        plugin._graphed_training(ctx, None, None)  # pyright: ignore[reportArgumentType]
