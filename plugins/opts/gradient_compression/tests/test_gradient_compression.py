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
from torch.nn.parallel import DistributedDataParallel

from core.api.config import validate
from core.api.errors import UsageError
from core.testing.cli import Outcome, run_cli
from core.testing.suites import assert_close, cached_run
from timetrial_gradient_compression.exchange import Bf16, PowerSgd
from timetrial_gradient_compression.plugin import GradientCompression, GradientCompressionConfig

pytestmark = pytest.mark.numbers

CPU = torch.device("cpu")
X_NF = torch.randn(16, 12, generator=torch.Generator().manual_seed(3))


on_cpu_alone = pytest.mark.skipif(torch.cuda.is_available(), reason="torch's PowerSGD waits for any GPU that it sees")


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
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


def powersgd(rank: int = 1, start_step: int = 2) -> PowerSgd:
    return PowerSgd(rank, start_step, min_rate=1.0, seed=5, device=CPU)


@pytest.mark.usefixtures("process_group")
def test_bf16_rounds_the_gradient_and_halves_the_bytes() -> None:
    exchange = Bf16()
    (true,), (got,) = gradients(network(), range(1)), gradients(network(exchange), range(1))
    assert torch.equal(got, true.bfloat16().float())
    assert vars(exchange.compressed) == {"steps": 1, "gradients": 4 * (96 + 8), "sent": 2 * (96 + 8)}


@on_cpu_alone
@pytest.mark.usefixtures("process_group")
def test_powersgd_sends_two_factors_and_the_bias() -> None:
    exchange = powersgd()
    got = gradients(network(exchange), range(3))
    assert vars(exchange.whole) == {"steps": 2, "gradients": 2 * 4 * 104, "sent": 2 * 4 * 104}
    assert vars(exchange.compressed) == {"steps": 1, "gradients": 4 * 104, "sent": 4 * (8 + 12 + 8)}
    assert [int(torch.linalg.matrix_rank(g)) for g in got][2] == 1


@on_cpu_alone
@pytest.mark.usefixtures("process_group")
def test_what_powersgd_does_not_send_is_sent_later() -> None:
    """Over all steps, gradients sent and the error kept add up to the true gradients."""
    exchange = powersgd()
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
@pytest.mark.usefixtures("process_group")
def test_powersgd_goes_on_from_its_state_and_not_without_it() -> None:
    undisturbed, killed = gradients(network(powersgd()), range(7)), powersgd()
    gradients(network(killed), range(5))
    restored, bare = powersgd(), powersgd()
    restored.load_state_dict(killed.state_dict())
    bare.state.iter = killed.state.iter
    assert all(torch.equal(a, b) for a, b in zip(resumed(restored), undisturbed[5:], strict=True))
    assert not torch.equal(resumed(bare)[0], undisturbed[5])


@on_cpu_alone
@pytest.mark.usefixtures("process_group")
def test_state_of_other_buckets_is_refused() -> None:
    exchange = powersgd()
    exchange.state.error_dict[0] = torch.zeros(3)
    with pytest.raises((UsageError, RuntimeError), match="keep the backend's bucket size"):
        gradients(network(exchange), range(1))


@on_cpu_alone
@pytest.mark.usefixtures("process_group")
def test_a_gradient_of_zeros_stays_finite() -> None:
    exchange = powersgd()
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
    sizes = ("workload.hidden=16384", "workload.learning_rate=0.0001", "backend.bucket_cap_mb=0.5")
    settings = ("method=powersgd", "start_step=2", "rank=16", "min_rate=0.0001")
    mine = run(*sizes, "+opt=gradient_compression", *(f"opt.gradient_compression.{s}" for s in settings))
    assert_close(mine, run(*sizes), rtol=1e-3, atol=1e-4)
    assert mine.evidence["gradient_compression"]["figures"]["compressed"]["steps"] == 10


def test_one_rank_has_nothing_to_compress(tmp_path: Path) -> None:
    refused = run_cli("workload=toy", "+opt=gradient_compression", run_dir=tmp_path / "run").expect(2)
    assert "requires multi_rank" in refused.stderr


def plugin(**changes: Any) -> GradientCompression:
    values = {"method": "powersgd", "rank": 2, "start_step": 2, "min_rate": 2.0, **changes}
    return GradientCompression(validate(GradientCompressionConfig, values, "opt.gradient_compression"))


@on_cpu_alone
@pytest.mark.parametrize(
    ("warmup_steps", "opts", "message"),
    [(0, {}, "needs warmup_steps of at least 1"), (1, {"cuda_graphs": {}}, "no CUDA graph can hold")],
)
def test_powersgd_refuses_what_would_break_it(warmup_steps: int, opts: dict[str, Any], message: str) -> None:
    ctx: Any = SimpleNamespace(config=SimpleNamespace(warmup_steps=warmup_steps, opt=opts), device=CPU)
    with pytest.raises(UsageError, match=message):
        plugin().communication_hook(ctx)


@on_cpu_alone
@pytest.mark.usefixtures("process_group")
def test_evidence_tells_warm_up_whole_and_compressed_steps_apart() -> None:
    mine = plugin(start_step=3, rank=1)
    config = SimpleNamespace(warmup_steps=1, opt={})
    ctx: Any = SimpleNamespace(config=config, device=CPU, seed_for=lambda *names: 5)
    assert not mine.verify().active
    state, hook = mine.communication_hook(ctx)
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
