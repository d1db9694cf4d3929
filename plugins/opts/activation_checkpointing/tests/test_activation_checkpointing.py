"""Recomputed blocks: the same bits, fewer bytes kept, nothing else touched."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
from torch import Tensor, nn

from core.api.errors import NotOfferedError
from core.api.hooks import PROJECT, Hooks, hookimpl
from core.testing.suites import cached_run
from timetrial_activation_checkpointing.blocks import CheckpointedBlock, statistics_kept
from timetrial_activation_checkpointing.plugin import ActivationCheckpointing, ActivationCheckpointingConfig

pytestmark = pytest.mark.numbers

CPU = torch.device("cpu")
IMAGES_NCHW = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """With all that a recomputation could get wrong: dropout, running statistics, and a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 3, 1)

    def forward(self, x_NCHW: Tensor, *, scale: float = 1.0) -> Tensor:
        inner = nn.functional.dropout(torch.relu(self.norm(self.first(x_NCHW))), 0.5, self.training)
        return x_NCHW + scale * self.second(inner)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList([Block(), Block(), Block()]), nn.Linear(3, 2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        for block in self.blocks:
            x_NCHW = block(x_NCHW, scale=0.5)
        return self.last(x_NCHW.mean((2, 3)))


class Baseline:
    @hookimpl
    def prepare_model(self, model: Any) -> Any:
        return model


def prepared(model: nn.Module, every: int = 1, blocks: list[nn.Module] | None = None) -> ActivationCheckpointing:
    manager, plugin = pluggy.PluginManager(PROJECT), ActivationCheckpointing(ActivationCheckpointingConfig(every=every))
    manager.add_hookspecs(Hooks)
    manager.register(Baseline())
    manager.register(plugin)
    blocks = list(model.blocks) if blocks is None else blocks
    ctx = SimpleNamespace(model=model, device=CPU, workload=SimpleNamespace(blocks=lambda model: blocks))
    assert manager.hook.prepare_model(ctx=ctx, model=model) is model
    return plugin


def steps(model: nn.Module, number: int = 3, autocast: bool = False) -> list[Tensor]:
    """Losses; with the same seed each time."""
    torch.manual_seed(7)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), list[Tensor]()
    for _ in range(number):
        with torch.autocast("cpu", enabled=autocast):
            loss = model(IMAGES_NCHW).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """The same network twice."""
    torch.manual_seed(0)
    network = Network()
    return network, copy.deepcopy(network)


@pytest.mark.parametrize("autocast", [False, True])
def test_losses_parameters_and_running_statistics_keep_their_bits(models: Any, autocast: bool) -> None:
    plain, mine = models
    plugin = prepared(mine)
    assert torch.equal(torch.stack(steps(plain, autocast=autocast)), torch.stack(steps(mine, autocast=autocast)))
    for (name, expected), (_, value) in zip(plain.state_dict().items(), mine.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name
    assert mine.blocks[0].norm.num_batches_tracked == 3
    assert mine.blocks[0].norm.momentum == 0.1
    assert plugin.verify().figures["recomputations"] == 9


def test_names_and_modules_stay(models: Any) -> None:
    plain, mine = models
    before = list(mine.modules())
    prepared(mine)
    assert list(mine.modules()) == before
    assert list(mine.state_dict()) == list(plain.state_dict())


def test_evidence_gives_the_bytes_kept_with_and_without(models: Any) -> None:
    _, mine = models
    plugin = prepared(mine)
    assert not plugin.verify().active
    steps(mine, 1)
    evidence = plugin.verify()
    assert evidence.active
    images, inner = IMAGES_NCHW.nbytes, IMAGES_NCHW.nbytes // 3 * 16
    assert evidence.figures["saved_bytes"] == 3 * images
    # Without: its input, what convolution, normalisation and dropout give, and two vectors of 16 statistics.
    kept = evidence.figures["saved_bytes_without"] / 3
    assert images + 3 * inner <= kept <= images + 5 * inner
    assert evidence.summary.startswith("3 of 3 blocks recomputed, 3 times in all; they kept 9,216 bytes")


def test_every_second_block(models: Any) -> None:
    plain, mine = models
    plugin = prepared(mine, every=2)
    assert torch.equal(torch.stack(steps(plain)), torch.stack(steps(mine)))
    assert plugin.verify().summary.startswith("2 of 3 blocks recomputed, 6 times")


def test_the_first_call_leaves_no_trace_but_its_own(models: Any) -> None:
    """It runs the block more than once, to see what it keeps."""
    plain, mine = models[0].blocks[0], models[1].blocks[0]
    CheckpointedBlock(mine, CPU)
    results = []
    for block in (plain, mine):
        torch.manual_seed(3)
        results.append((block(IMAGES_NCHW), torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(plain.norm.running_mean, mine.norm.running_mean)
    assert mine.norm.num_batches_tracked == 1


def test_inference_recomputes_nothing(models: Any) -> None:
    _, mine = models
    plugin = prepared(mine)
    with torch.no_grad():
        mine.eval()(IMAGES_NCHW)
    assert not plugin.verify().active


def test_statistics_are_released_after_an_error() -> None:
    norm = nn.BatchNorm2d(3)

    def fail() -> None:
        with statistics_kept([norm]):
            norm(IMAGES_NCHW)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (norm.momentum, int(norm.num_batches_tracked)) == (0.1, 0)
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(NotOfferedError, match="names none"):
        prepared(nn.Linear(2, 2), blocks=[])


@pytest.mark.distributed
def test_synchronised_batch_normalisation_keeps_its_bits_on_two_ranks() -> None:
    run = (
        "workload=resnet",
        "workload.width=8",
        "workload.targets.top1=0.5",
        "stop.steps=4",
        "backend=gloo",
        "launch.nproc=2",
    )
    plain, mine = cached_run(*run), cached_run(*run, "+opt=activation_checkpointing")
    assert mine.expect(4).result["parameters_sha256"] == plain.expect(4).result["parameters_sha256"]


@pytest.mark.convergence
def test_compiled_blocks_are_recomputed_too(models: Any) -> None:
    """The compiled graph with marked blocks keeps less; its kernels, fused otherwise, may round otherwise."""
    found = []
    for model in models:
        plugin = prepared(model) if model is models[1] else None
        model.compile()
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = steps(model, 1)
        found.append((kept, losses[0], model.state_dict()))
    (kept_plain, loss_plain, state_plain), (kept, loss, state) = found
    assert kept < kept_plain
    torch.testing.assert_close(loss, loss_plain)
    torch.testing.assert_close(state, state_plain)
    assert plugin.verify().summary == "3 of 3 blocks compiled with the mark to recompute them"
