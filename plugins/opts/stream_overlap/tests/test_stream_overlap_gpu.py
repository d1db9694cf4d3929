"""What only a GPU can show: copies and updates on separate streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn

from core.api.tree import map_tensors
from core.api.types import Purpose
from timetrial_stream_overlap.feed import Counts, Feed
from timetrial_stream_overlap.updates import BackwardUpdates

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = torch.device("cuda", 0)


def to_device(items: Iterable[dict[str, Tensor]], purpose: Purpose) -> Iterator[dict[str, Tensor]]:
    return (map_tensors(lambda tensor: tensor.to(GPU), item) for item in items)


def fed(items: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    return Feed(to_device, GPU, 2)(items, "train", Counts())


def test_what_is_copied_beside_the_steps_arrives_whole() -> None:
    """Large copies, and a consumer that starts at once: without the event it would read what is not there yet."""
    sources = [{"x": torch.full((2_000_000,), float(n)), "n": torch.tensor(n)} for n in range(20)]
    sums = [item["x"].sum(dtype=torch.float64) for item in fed(iter(sources))]
    assert [s.item() for s in sums] == [2_000_000.0 * n for n in range(20)]


def test_memory_that_was_handed_out_is_not_used_again_while_it_is_read() -> None:
    weight = torch.randn(4096, 4096, device=GPU)
    results: list[Tensor] = []
    for item in fed({"x": torch.full((4096, 256), float(n))} for n in range(20)):
        busy = weight @ weight  # keeps the consumer's stream behind
        results.append((item["x"] + 0 * busy[:, :256]).mean())
        del item
    assert [round(r.item()) for r in results] == list(range(20))


def test_items_made_on_the_device_from_what_the_consumer_made_are_whole() -> None:
    base = torch.randn(4096, 4096, device=GPU) @ torch.randn(4096, 4096, device=GPU)

    def items() -> Iterator[dict[str, Tensor]]:
        for n in range(5):
            yield {"x": base + n}

    seen = [item["x"] - n for n, item in enumerate(fed(items()))]
    assert all(torch.allclose(x, base, atol=1e-2) for x in seen)


def test_updates_on_a_stream_of_their_own_have_the_bits_of_the_baseline() -> None:
    def trained(watching: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(6)]).to(GPU)
        optimizer, updates = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), BackwardUpdates(GPU)
        if watching:
            updates.bind(optimizer)
            updates.watch(1_500_000)
            updates.armed = True
        for step in range(5):
            x = torch.randn(256, 512, generator=torch.Generator().manual_seed(step)).to(GPU)
            model(x).square().mean().backward()
            updates.finish() if watching else (optimizer.step(), optimizer.zero_grad())
        return model

    for mine, theirs in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        assert torch.equal(mine, theirs)
