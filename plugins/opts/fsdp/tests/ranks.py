"""What each of two ranks does in `test_fsdp.py`: `python ranks.py`, with RANK and the like in the environment."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from timetrial_fsdp.sharding import ShardedModel, held

CPU = torch.device("cpu")
X_NF = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def sharded(model: nn.Sequential, reshard: bool = True) -> ShardedModel:
    return ShardedModel(model, [model[0], model[1]], CPU, 2, reshard)


def each_rank_holds_a_part_under_the_same_names() -> None:
    plain, model = network(), network()
    mine = sharded(model)
    assert mine.groups == 3
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert all(torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    total = held(model.parameters())
    assert (total.whole, total.unsharded) == (held(plain.parameters()).whole, 0)
    parts: list[int] = [0, 0]
    dist.all_gather_object(parts, total.local)
    assert sum(parts) == total.whole and min(parts) > 0


def gradients_are_the_mean_over_ranks_of_weighted_shares() -> None:
    """Shares of 3 and 1 examples, weighted as `core.api.types.Batch` says."""
    for reshard in (True, False):
        plain, model = network().eval(), network().eval()
        sharded(model, reshard)
        share = X_NF[:3] if dist.get_rank() == 0 else X_NF[3:]
        (model(share).square().mean() * len(share) * 2 / len(X_NF)).backward()
        plain(X_NF).square().mean().backward()
        for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), expected.grad, rtol=0, atol=1e-6)


def a_whole_model_is_evaluated_without_the_other_rank(reshard: bool) -> None:
    """Rank 0 evaluates three batches, rank 1 one, between two steps of training."""
    plain, model = network().eval(), network().eval()
    mine = sharded(model, reshard)
    model(X_NF).sum().backward()
    with torch.no_grad(), mine.whole():
        for _ in range(3 if dist.get_rank() == 0 else 1):
            torch.testing.assert_close(model(X_NF), plain(X_NF))
    assert held(model.parameters()).unsharded == 0
    first_is_sharded: list[bool] = []
    model[1].register_forward_hook(lambda *_: first_is_sharded.append(isinstance(model[0].weight, DTensor)))
    model(X_NF).sum().backward()
    assert first_is_sharded == [reshard]  # again, by the time when the second block has run
    assert held(model.parameters()).unsharded == 0


def trainable() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = network()
    model.append(nn.Linear(3, 7)).append(nn.Linear(7, 3))
    model[5].weight = model[3].weight  # two names for one parameter
    mine = sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    mine.give_whole_states(model, optimizer)
    return model, optimizer


def whole_states_are_given_and_taken() -> None:
    """Also just after a forward pass, which leaves the last group gathered."""
    model, optimizer = trainable()
    model(X_NF).sum().backward()
    optimizer.step()
    states = model.state_dict(), optimizer.state_dict()
    momentum = {i: own["momentum_buffer"] for i, own in states[1]["state"].items()}
    assert not any(isinstance(tensor, DTensor) for tensor in (*states[0].values(), *momentum.values()))
    assert [t.shape for t in momentum.values()] == [p.shape for p in model.parameters()]
    assert list(states[0]) == [*network().state_dict(), "4.weight", "4.bias", "5.weight", "5.bias"]
    other, its_optimizer = trainable()
    with torch.no_grad():
        other(X_NF)
    other.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    for mine, taken in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.to_local(), taken.to_local())
        buffers = (o.state[p]["momentum_buffer"] for o, p in ((optimizer, mine), (its_optimizer, taken)))
        assert torch.equal(*(buffer.to_local() for buffer in buffers))
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), other.state_dict().values(), strict=True))


if __name__ == "__main__":
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
    each_rank_holds_a_part_under_the_same_names()
    gradients_are_the_mean_over_ranks_of_weighted_shares()
    a_whole_model_is_evaluated_without_the_other_rank(reshard=True)
    a_whole_model_is_evaluated_without_the_other_rank(reshard=False)
    whole_states_are_given_and_taken()
    dist.destroy_process_group()
