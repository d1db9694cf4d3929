"""What travels between ranks, and what is kept of what does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from core.api.config import validate
from core.api.errors import ConflictError, UsageError
from core.api.seams import GRADIENT_EXCHANGE
from core.testing.cli import Outcome, run_cli, run_program, run_ranks
from core.testing.suites import assert_close, cached_run
from timetrial_gradient_compression.exchange import Bf16, PowerSgd
from timetrial_gradient_compression.plugin import GradientCompression, GradientCompressionConfig

pytestmark = pytest.mark.numbers

RANKS = Path(__file__).with_name("ranks.py")
CPU = torch.device("cpu")
X_NF = torch.randn(16, 12, generator=torch.Generator().manual_seed(3))


on_cpu_alone = pytest.mark.skipif(torch.cuda.is_available(), reason="torch's PowerSGD waits for any GPU that it sees")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def network(exchange: Bf16 | PowerSgd | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(12, 8))
    if exchange:
        model.register_comm_hook(None, exchange.exchange)
    return model


def gradients(model: nn.Module, steps: range) -> list[Tensor]:
    """Of the weight (8 x 12), step by step; the data differs from step to step."""
    found: list[Tensor] = []
    for step in steps:
        model.zero_grad()
        model(X_NF.roll(step, 1)).square().mean().backward()
        found.append(model.module.weight.grad.clone())
    return found


def powersgd(mesh: DeviceMesh) -> PowerSgd:
    return PowerSgd(mesh, rank=1, start_step=2, min_rate=1.0, seed=5)


def test_bf16_rounds_the_gradient_and_halves_the_bytes(mesh: DeviceMesh) -> None:
    exchange = Bf16(mesh)
    (true,), (got,) = gradients(network(), range(1)), gradients(network(exchange), range(1))
    assert torch.equal(got, true.bfloat16().float())
    assert vars(exchange.compressed) == {"steps": 1, "gradients": 4 * (96 + 8), "sent": 2 * (96 + 8)}


@on_cpu_alone
def test_powersgd_sends_two_factors_and_the_bias(mesh: DeviceMesh) -> None:
    exchange = powersgd(mesh)
    got = gradients(network(exchange), range(3))
    assert vars(exchange.whole) == {"steps": 2, "gradients": 2 * 4 * 104, "sent": 2 * 4 * 104}
    assert vars(exchange.compressed) == {"steps": 1, "gradients": 4 * 104, "sent": 4 * (8 + 12 + 8)}
    assert [int(torch.linalg.matrix_rank(g)) for g in got][2] == 1


@on_cpu_alone
def test_what_powersgd_does_not_send_is_sent_later(mesh: DeviceMesh) -> None:
    """Over all steps, gradients sent and the error kept add up to the true gradients."""
    exchange = powersgd(mesh)
    true, got = torch.stack(gradients(network(), range(9))), torch.stack(gradients(network(exchange), range(9)))
    assert not torch.allclose(got[2:], true[2:], rtol=0.1)
    (error,) = exchange.state.error_dict.values()
    weight = error[-96:].view(8, 12) if torch.count_nonzero(error[:8]) == 0 else error[:96].view(8, 12)
    torch.testing.assert_close(got.sum(0) + weight, true.sum(0), rtol=0, atol=1e-6)


def resumed(exchange: PowerSgd) -> list[Tensor]:
    """The gradients of steps 5 and 6 in a new process: after a warm-up, which gives the buckets their final shape."""
    model = network()
    gradients(model, range(1))
    model.register_comm_hook(None, exchange.exchange)
    return gradients(model, range(5, 7))


@on_cpu_alone
def test_powersgd_goes_on_from_its_state_and_not_without_it(mesh: DeviceMesh) -> None:
    undisturbed, killed = gradients(network(powersgd(mesh)), range(7)), powersgd(mesh)
    gradients(network(killed), range(5))
    restored, bare = powersgd(mesh), powersgd(mesh)
    restored.load_state_dict(killed.state_dict())
    bare.state.iter = killed.state.iter
    assert all(torch.equal(a, b) for a, b in zip(resumed(restored), undisturbed[5:], strict=True))
    assert not torch.equal(resumed(bare)[0], undisturbed[5])


@on_cpu_alone
def test_state_of_other_buckets_is_refused(mesh: DeviceMesh) -> None:
    exchange = powersgd(mesh)
    exchange.state.error_dict[0] = torch.zeros(3)
    with pytest.raises((UsageError, RuntimeError), match=r"keep opt\.ddp\.bucket_cap_mib"):
        gradients(network(exchange), range(1))


@on_cpu_alone
def test_a_gradient_of_zeros_stays_finite(mesh: DeviceMesh) -> None:
    exchange = powersgd(mesh)
    model = network(exchange)
    for _ in range(4):
        (model(X_NF) * 0).sum().backward()
    assert torch.equal(model.module.weight.grad, torch.zeros(8, 12))


def run(*arguments: str) -> Outcome:
    return cached_run("workload=toy", "backend=gloo", "launch.nproc=2", "stop.steps=12", *arguments).expect(4)


@pytest.mark.distributed
def test_bf16_between_two_ranks_stays_near_the_baseline() -> None:
    mine = run("+opt=gradient_compression")
    assert_close(mine, run(), rtol=0.01, atol=0.001)
    assert mine.result["parameters_sha256"] != run().result["parameters_sha256"]
    evidence = mine.evidence["gradient_compression"]
    parameters = 16 * 64 + 64 + 64 * 4 + 4
    assert evidence["active"]
    assert evidence["figures"]["bytes_a_step"] == 2 * parameters
    assert evidence["figures"]["compressed"] == {"steps": 12, "gradients": 12 * 4 * parameters, "sent": 24 * parameters}


@on_cpu_alone
@pytest.mark.distributed
def test_powersgd_of_full_rank_in_several_buckets_gives_the_baselines_result() -> None:
    """As many columns as the matrices have lose nothing; a wrong order of exchanges would give nonsense, or hang."""
    sizes = ("workload.hidden=16384", "workload.learning_rate=0.0001", "opt.ddp.bucket_cap_mib=0.5")
    settings = ("method=powersgd", "start_step=2", "rank=16", "min_rate=0.0001")
    mine = run("opt=[ddp,gradient_compression]", *sizes, *(f"opt.gradient_compression.{s}" for s in settings))
    assert_close(mine, run("opt=ddp", *sizes), rtol=1e-3, atol=1e-4)
    assert mine.evidence["gradient_compression"]["figures"]["compressed"]["steps"] == 10


def test_one_rank_has_nothing_to_compress(tmp_path: Path) -> None:
    refused = run_cli("workload=toy", "+opt=gradient_compression", run_dir=tmp_path / "run").expect(2)
    assert refused.failure == "not_here"


@pytest.mark.distributed
def test_without_distributeddataparallel_it_has_nothing_to_act_on(tmp_path: Path) -> None:
    arguments = ("workload=toy", "backend=gloo", "launch.nproc=2", "default_exchange=null", "+opt=gradient_compression")
    refused = run_ranks(*arguments, run_dir=tmp_path / "run").expect(2)
    assert refused.failure == "not_offered"


@pytest.mark.distributed
def test_where_the_model_is_split_only_ranks_with_the_same_part_exchange() -> None:
    for rank in run_program(RANKS, nodes="0000"):
        rank.expect(0)


def plugin(**changes: Any) -> GradientCompression:
    values = {"method": "powersgd", "rank": 2, "start_step": 2, "min_rate": 2.0, **changes}
    return GradientCompression(validate(GradientCompressionConfig, values, "opt.gradient_compression"))


@pytest.mark.parametrize(
    ("prewarm_steps", "opts", "message"),
    [(0, (), "needs prewarm_steps of at least 1"), (1, ("cuda_graphs",), "a CUDA graph cannot capture")],
)
def test_powersgd_refuses_what_would_break_it(prewarm_steps: int, opts: tuple[str, ...], message: str) -> None:
    plan: Any = SimpleNamespace(root=SimpleNamespace(prewarm_steps=prewarm_steps), opts=opts)
    with pytest.raises(ConflictError, match=message):
        plugin().check(plan)
    plugin(method="bf16").check(plan)


@on_cpu_alone
def test_evidence_tells_warm_up_whole_and_compressed_steps_apart(mesh: DeviceMesh) -> None:
    mine = plugin(start_step=3, rank=1)
    ranks = SimpleNamespace(device_mesh=lambda device_type: {"data": mesh})
    ctx: Any = SimpleNamespace(mesh=ranks, device=CPU, seed_for=lambda *names: 5)
    assert not mine.verify().active
    (replacement,) = mine.replace(ctx)
    assert replacement.seam is GRADIENT_EXCHANGE
    state, hook = replacement.make(None)
    model = network()
    model.register_comm_hook(state, hook)
    gradients(model, range(1))
    mine.on_block("start")
    gradients(model, range(3))
    evidence = mine.verify()
    assert not evidence.active
    assert evidence.summary == "3 steps exchanged whole: compression starts after 3"
    gradients(model, range(2))
    assert mine.verify().figures["compressed"]["steps"] == 2
    assert mine.verify().active
