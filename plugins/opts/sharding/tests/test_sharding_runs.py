"""A model that is split over ranks, on the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.compose.composition import compose
from core.compose.discovery import discover
from core.compose.plan import RunPlan
from core.compose.resolve import resolve
from core.testing.cli import Outcome, run_cli, run_ranks
from core.testing.suites import assert_close, cached_run

TOY = ("workload=toy", "backend=gloo")
BOTH = ("+opt=[tensor_parallel,fsdp]", "launch.nproc=4")
STEPS = 12


def one_rank(*more: str) -> Outcome:
    return cached_run("workload=toy", f"stop.steps={STEPS}", *more).expect(4)


def plan(*overrides: str) -> RunPlan:
    """What would run, without a process."""
    registry = discover()
    return resolve(*compose([*TOY, *overrides], registry), registry)


@pytest.mark.numbers
@pytest.mark.distributed
def test_bert_trains_on_a_mesh_of_shards_and_tensor_parts_as_on_one_rank() -> None:
    run = ("workload=bert", "workload.global_batch_size=8", "workload.sequence_length=32", "stop.steps=3")
    alone, split = cached_run(*run).expect(4), cached_run(*run, "backend=gloo", *BOTH).expect(4)
    torch.testing.assert_close(torch.tensor(split.losses), torch.tensor(alone.losses), rtol=0, atol=1e-4)
    assert split.result["mesh"] == {"data": 1, "shard": 2, "tensor": 2}
    evidence = split.evidence
    assert evidence["tensor_parallel"]["active"] and evidence["fsdp"]["active"]
    # In each of 2 layers, weights and biases of four layers split by column, and weights of two split by row.
    assert evidence["tensor_parallel"]["figures"]["split"] == 2 * (4 * 2 + 2)
    # Forward one after each of the two, backward one before each of the four.
    assert evidence["tensor_parallel"]["figures"]["sums_per_step"] == 2 * (2 + 4)
    parameters, state = (evidence["fsdp"]["figures"][name] for name in ("parameters", "optimizer_state"))
    whole = sum(tensor.nbytes for name, tensor in alone.parameters.items() if "decoder.weight" not in name)
    assert parameters["whole"] == pytest.approx(whole, rel=0.01)  # buffers aside
    assert parameters["local"] < 0.35 * parameters["whole"]
    assert (state["whole"], state["local"]) == (2 * parameters["whole"], 2 * parameters["local"])  # Adam's two moments


@pytest.mark.numbers
@pytest.mark.distributed
def test_a_split_run_is_killed_resumed_and_goes_on_on_one_rank(tmp_path: Path) -> None:
    """The resumed run has the same bits; its checkpoint has the baseline's names and shapes and serves any run."""
    run = (*TOY, *BOTH, f"stop.steps={STEPS}")
    whole = cached_run(*run).expect(4)
    assert_close(whole, one_rank(), rtol=1e-3, atol=1e-4)
    saving = (*run, "checkpoint.every_steps=5")
    assert run_ranks(*saving, run_dir=tmp_path / "run", fault="step@8=kill").code != 0
    resumed = run_ranks(*saving, run_dir=tmp_path / "run").expect(4)
    assert resumed.result["restarts"] == 1
    assert resumed.result["mesh"] == {"data": 1, "shard": 2, "tensor": 2}
    assert resumed.result["parameters_sha256"] == whole.result["parameters_sha256"]
    assert resumed.losses == whole.losses

    plain = cached_run("workload=toy", f"stop.steps={STEPS + 6}").expect(4)
    assert {n: t.shape for n, t in resumed.parameters.items()} == {n: t.shape for n, t in plain.parameters.items()}
    go_on = ("workload=toy", f"stop.steps={STEPS + 6}", f"resume={tmp_path / 'run'}")
    refused = run_ranks(*go_on, run_dir=tmp_path / "refused").expect(2)
    assert "resume_changed=true" in refused.stderr
    alone = run_ranks(*go_on, "resume_changed=true", run_dir=tmp_path / "alone").expect(4)
    torch.testing.assert_close(alone.losses, plain.losses[STEPS:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(alone.parameters, plain.parameters, rtol=1e-3, atol=1e-4)
    assert alone.result["changed"] and not alone.result["scored"]


@pytest.mark.numbers
@pytest.mark.distributed
def test_hybrid_sharding_keeps_several_copies_of_the_model() -> None:
    run = (*TOY, "launch.nproc=4", "+opt=fsdp", "opt.fsdp.shard_size=2", f"stop.steps={STEPS}")
    hybrid = cached_run(*run).expect(4)
    assert_close(hybrid, one_rank(), rtol=1e-3, atol=1e-4)
    assert hybrid.result["mesh"] == {"data": 2, "shard": 2}
    figures = hybrid.evidence["fsdp"]["figures"]
    assert (figures["shard_ranks"], figures["copies"]) == (2, 2)
    assert figures["parameters"]["local"] * 2 == figures["parameters"]["whole"]


@pytest.mark.distributed
def test_the_warm_up_leaves_no_trace_in_a_split_model() -> None:
    run = (*TOY, *BOTH, f"stop.steps={STEPS}", "workload.dropout=0.2")
    cold, warm = (cached_run(*run, f"prewarm_steps={steps}").expect(4) for steps in (0, 2))
    assert cold.result["parameters_sha256"] == warm.result["parameters_sha256"]
    assert warm.evidence["tensor_parallel"]["numerics"] == "changes"  # ranks drop units that one rank would not


@pytest.mark.numbers
@pytest.mark.distributed
def test_a_model_with_batch_normalisation_trains_as_without_and_each_rank_holds_half() -> None:
    run = ("workload=resnet", "workload.width=8", "stop.steps=4", "backend=gloo", "launch.nproc=2")
    plain, mine = cached_run(*run).expect(4), cached_run(*run, "+opt=fsdp").expect(4)
    assert_close(mine, plain, rtol=1e-3, atol=1e-4)
    evidence = mine.evidence["fsdp"]
    assert evidence["active"], evidence
    parameters, state = evidence["figures"]["parameters"], evidence["figures"]["optimizer_state"]
    assert parameters["local"] * 2 == pytest.approx(parameters["whole"], rel=0.01)
    assert state == parameters  # momentum, like the parameters
    assert evidence["figures"]["groups"] == 4


def test_the_order_on_the_command_line_never_matters_and_ddp_comes_along() -> None:
    """Layers are split first, then sharded or wrapped in DistributedDataParallel."""
    for other in ("fsdp", "ddp"):
        plans = [
            plan("launch.nproc=4", f"+opt=[{opts}]")
            for opts in (f"tensor_parallel,{other}", f"{other},tensor_parallel")
        ]
        assert plans[0].hash() == plans[1].hash()
        assert plans[0].opts == ("tensor_parallel", other)
    alone = plan("launch.nproc=4", "+opt=tensor_parallel")
    assert alone.hash() == plans[0].hash()
    sizes = {d.name: d.size for d in plan("launch.nproc=8", *BOTH[:1], "opt.fsdp.shard_size=2").dimensions}
    assert sizes == {"data": 2, "shard": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("command", "kind", "words"),
    [
        ("+opt=fsdp launch.nproc=1", "not_here", "requires multi_rank"),
        ("+opt=[tensor_parallel,fsdp] launch.nproc=2", "not_here", "'fsdp' has nobody to shard with"),
        ("+opt=tensor_parallel launch.nproc=3", "usage", "3 ranks cannot be arranged as tensor 2"),
        ("+opt=[fsdp,ddp] launch.nproc=2", "conflict", "both claim gradient_exchange"),
        ("+opt=[fsdp,gradient_compression] launch.nproc=2", "conflict", "both claim gradient_exchange.hook"),
        ("+opt=[fsdp,compile] launch.nproc=2", "conflict", "hooks around each block"),
        ("+opt=[tensor_parallel,fused_optimizer] launch.nproc=2", "conflict", "take whole parameters"),
        ("+opt=[tensor_parallel,stream_overlap] launch.nproc=2", "conflict", "in the backward pass"),
        ("+opt=[tensor_parallel,zero_copy_concat] launch.nproc=2", "conflict", "one block of memory"),
        ("workload=minigo +opt=tensor_parallel launch.nproc=2", "not_offered", "the mesh dimension tensor"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_starts(command: str, kind: str, words: str, tmp_path: Path) -> None:
    refused = run_cli(*TOY, *command.split(), run_dir=tmp_path / "run").expect(2)
    assert refused.failure == kind
    assert words in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("command", "kind", "words"),
    [
        ("workload=toy workload.hidden=63", "usage", "dimension 0 of 0.weight is 63, which cannot be split over 2"),
        ("workload=toy +opt=[tensor_parallel,activation_checkpointing]", "conflict", "another opt has replaced"),
        (
            "workload=bert data=synthetic launch.nproc=4 opt.tensor_parallel.degree=4", "usage",
            "num_attention_heads is 2, which cannot be split over 4 ranks: set opt.tensor_parallel.degree to a divisor",
        ),
        ("workload=resnet workload.width=8", "not_offered", "core.tensor_plan, which nothing here offers"),
    ],
    ids=["size", "replaced", "heads", "no plan"],
)  # fmt: skip
def test_a_model_that_cannot_be_split_is_refused_in_one_line(
    command: str, kind: str, words: str, tmp_path: Path
) -> None:
    chosen = command if "+opt" in command else f"+opt=tensor_parallel {command}"
    refused = run_ranks("backend=gloo", "launch.nproc=2", *chosen.split(), run_dir=tmp_path / "run").expect(2)
    assert refused.failure == kind
    (line,) = (line for line in refused.stderr.splitlines() if "timetrial: " in line)
    assert words in line
