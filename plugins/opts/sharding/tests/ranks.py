"""What each of four ranks does in `test_sharding.py`: `python ranks.py`, with RANK and the like in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from core.api.errors import ConflictError, PluginError, UsageError
from core.api.reference import LAMB, LARS, parameter_groups
from timetrial_sharding.fsdp import ShardedModel
from timetrial_sharding.layout import SplitLayout, held
from timetrial_sharding.tensor import parallelize

VOCABULARY, HIDDEN, HEADS, INNER = 13, 12, 4, 22  # some parts of a shard are unequal: 13 rows, and 11 of the inner size
ROWS, LENGTH, STEPS = 8, 5, 5

PLAN = {
    "layer.*.heads": "divide",
    "layer.*.query": "column",
    "layer.*.key": "column",
    "layer.*.value": "column",
    "layer.*.attended": "row",
    "layer.*.intermediate": "column",
    "layer.*.output": "row",
}


class Block(nn.Module):
    """BERT's: self-attention and a feed-forward part, each added to its input and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.attended, self.attended_norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
        self.intermediate, self.output = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN, bias=False)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        parts = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = self.attended_norm(x + self.attended(mixed))
        return self.norm(x + self.output(F.gelu(self.intermediate(x))))


class Network(nn.Module):
    """Tokens in, logits out; the decoder's weight is the embedding's, and a buffer is carried along."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layer = nn.ModuleList(Block() for _ in range(2))
        self.decoder = nn.Linear(HIDDEN, VOCABULARY)
        self.decoder.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layer:
            x = layer(x)
        return self.decoder(x)


def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids, labels = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=generator)
    return ids, labels


def adapted(model: nn.Module) -> list[dict[str, Any]]:
    """Only matrices adapt: the gradient of a key's bias is 0 but for rounding, which a trust ratio would amplify."""
    matrices, others = parameter_groups(model, 0.01)
    return [matrices, {**others, "adapt": False}]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "lamb": lambda model: LAMB(adapted(model), lr=0.01, max_grad_norm=0.05),
    "lars": lambda model: LARS(adapted(model), lr=0.5, eeta=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "adamw_foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


class Trainer:
    """A network and its optimizer over a mesh of named dimensions, or on one rank."""

    def __init__(self, optimizer: str, mesh: DeviceMesh | None) -> None:
        self.model = network()
        self.forward: nn.Module = self.model
        self.data_rank, self.data_size = 0, 1
        self.layout: SplitLayout | None = None
        self.sharded: ShardedModel | None = None
        splits = {} if mesh is None else self._distribute(mesh)
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        if mesh is not None:
            self.layout = SplitLayout(self.model, self.optimizer, mesh, splits)

    def _distribute(self, mesh: DeviceMesh) -> dict[str, int]:
        names = mesh.mesh_dim_names or ()
        splits = parallelize(self.model, mesh["tensor"], PLAN) if "tensor" in names else {}
        data = tuple(name for name in names if name != "tensor")
        if "shard" in names:
            self.sharded = ShardedModel(self.model, list(self.model.layer), mesh[data], reshard=True)
        elif data:
            self.forward = DistributedDataParallel(self.model, process_group=mesh.get_group("data"))
        for name in data:
            self.data_rank = self.data_rank * mesh[name].size() + mesh.get_local_rank(name)
            self.data_size *= mesh[name].size()
        return splits

    def step(self, number: int) -> float:
        """The mean loss of the whole batch, before the update."""
        ids, labels = (part.chunk(self.data_size)[self.data_rank] for part in batch(number))
        loss = F.cross_entropy(self.forward(ids).flatten(0, 1), labels.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in self.model.parameters())
        losses: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(losses, loss.item())
        return sum(losses) / len(losses)  # each data rank's as often as any other's

    def states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.layout is None:
            return self.model.state_dict(), self.optimizer.state_dict()
        return self.layout.model_state(), self.layout.optimizer_state()

    def load(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        if self.layout is None:
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)
        else:
            self.layout.load_model_state(model)
            self.layout.load_optimizer_state(optimizer)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def assert_alike(mine: Any, expected: Any, tolerance: float) -> None:
    """The same names in the same order, plain tensors of the same shape and value, and equal other data."""
    for (path, a), (other, b) in zip(leaves(mine), leaves(expected), strict=True):
        assert path == other
        assert type(a) is type(b), (path, type(a), type(b))
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, path=path: f"{path}: {text}")
        else:
            assert a == b, (path, a, b)


def trains_saves_and_resumes_as_one_rank(optimizer: str, mesh: DeviceMesh) -> None:
    one, mine = Trainer(optimizer, None), Trainer(optimizer, mesh)
    assert_alike(mine.states()[0], one.states()[0], 0.0)
    expected, losses = ([trainer.step(n) for n in range(STEPS)] for trainer in (one, mine))
    assert expected[0] - expected[-1] > 1e-3, expected
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-9)
    states = mine.states()
    assert_alike(states[0], one.states()[0], 1e-9)
    assert_alike(states[1]["state"], one.states()[1]["state"], 1e-9)
    states = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, states)

    resumed, alone = Trainer(optimizer, mesh), Trainer(optimizer, None)
    resumed.step(77)  # so that everything is overwritten
    resumed.load(*states)
    assert_alike(resumed.states(), states, 0.0)
    for a, b in zip(mine.layout.local_parameters(), resumed.layout.local_parameters(), strict=True):
        assert torch.equal(a, b)
    alone.load(*states)
    assert_alike(alone.states(), states, 0.0)
    first, second = mine.step(STEPS), resumed.step(STEPS)
    assert first == second
    assert_alike(resumed.states(), mine.states(), 0.0)
    assert abs(alone.step(STEPS) - first) < 1e-9


def each_rank_holds_its_share(mesh: DeviceMesh) -> None:
    names = mesh.mesh_dim_names or ()
    mine, whole = Trainer("sgd", mesh), held(network().parameters())
    mine.step(0)
    assert mine.layout is not None
    for total in (held(mine.layout.parameters()), held(v["momentum_buffer"] for v in mine.optimizer.state.values())):
        assert total.whole == whole.whole
        shares: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(shares, total.local)
        if "tensor" not in names:
            assert sum(shares) == 2 * whole.whole  # replicated over "data"
        assert max(shares) < 0.75 * whole.whole
        # Embedding and decoder bias; in each block two normalisations and the bias after a sum.
        assert total.unsharded == (0 if "shard" in names else 2 + 2 * 5), total


def ranks_of_a_tensor_group_stay_the_same_bit_for_bit(mesh: DeviceMesh) -> None:
    mine = Trainer("lamb", mesh)
    for step in range(3):
        mine.step(step)
    whole = [mine.model.embedding.weight, mine.model.layer[0].norm.weight, mine.model.layer[0].attended.bias]
    for tensor in (p.to_local() if isinstance(p, DTensor) else p for p in whole):
        everyone = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(everyone, tensor.detach(), group=mesh.get_group("tensor"))
        assert torch.equal(*everyone)


def gradients_are_cleared_without_a_step(mesh: DeviceMesh) -> None:
    """As after a step that only warms up; once more, they would be added."""
    mine = Trainer("sgd", mesh)
    for set_to_none in (True, False):
        mine.forward(batch(0)[0]).sum().backward()
        mine.optimizer.zero_grad(set_to_none)
        grads = [parameter.grad for parameter in mine.model.parameters()]
        assert all(grad is None if set_to_none else not grad.any() for grad in grads)


def evaluates_unequally_many_batches(mesh: DeviceMesh) -> None:
    """On data ranks; the ranks of a tensor group evaluate the same ones. Afterwards each holds its part again."""
    mine, ids = Trainer("sgd", mesh), batch(3)[0]
    mine.step(0)
    one = network()
    one.load_state_dict(mine.states()[0])
    with torch.no_grad(), mine.sharded.whole() if mine.sharded else nullcontext():
        for _ in range(1 + mine.data_rank):
            torch.testing.assert_close(mine.model(ids), one(ids), rtol=0, atol=1e-9)
    if mine.sharded:
        assert held(mine.model.parameters()).unsharded == 0
        first_is_sharded: list[bool] = []
        block, other = mine.model.layer[0], mine.model.layer[1]
        other.register_forward_hook(lambda *_: first_is_sharded.append(isinstance(block.query.weight, DTensor)))
        mine.step(1)
        assert first_is_sharded == [True]  # by the time when the second block has run


def dropout_draws_own_numbers_where_activations_are_split(mesh: DeviceMesh) -> None:
    def toy() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5))

    one, mine, seen = toy(), toy(), dict[int, Tensor]()
    splits = parallelize(mine, mesh["tensor"], {"0": "column", "2": "random", "3": "row"})
    assert splits == {"0.weight": 0, "0.bias": 0, "3.weight": 1}
    for index in (2, 4):
        mine[index].register_forward_hook(lambda _, args, out, index=index: seen.update({index: (out == 0)[:, :32]}))
    with torch.no_grad():
        mine[0].bias.add_(100.0)  # no unit is 0 but by dropout
        torch.manual_seed(5)
        first = mine(torch.ones(4, 4))
        torch.manual_seed(5)
        assert torch.equal(first, mine(torch.ones(4, 4)))
        after = torch.rand(1)
        everyone = {index: [torch.empty_like(mask) for _ in range(2)] for index, mask in seen.items()}
        for index, mask in seen.items():
            dist.all_gather(everyone[index], mask.contiguous(), group=mesh.get_group("tensor"))
        assert not torch.equal(*everyone[2])
        assert torch.equal(*everyone[4])
        shared = [torch.empty_like(after) for _ in range(2)]
        dist.all_gather(shared, after, group=mesh.get_group("tensor"))
        assert torch.equal(*shared)
        one[0].bias.add_(100.0)
        torch.testing.assert_close(mine.eval()(torch.ones(4, 4)), one.eval()(torch.ones(4, 4)))


def a_plan_that_does_not_fit_is_refused(mesh: DeviceMesh) -> None:
    for plan, error, words in (
        ({"layer.*.querry": "column"}, PluginError, "'layer.*.querry', which matches nothing"),
        ({"layer.*": "column"}, PluginError, "layer.0, a Block: it can split nn.Linear"),
        ({"layer.0.query": "columns"}, PluginError, "the style 'columns': use one of column, row, random, divide"),
        ({"decoder": "column"}, PluginError, "decoder.weight, which is tied to embedding.weight"),
        ({"layer.0.missing": "divide"}, PluginError, "layer.0.missing, which is None, not an integer"),
        ({"2": "column"}, UsageError, "dimension 0 of 2.weight is 5, which cannot be split over 2 ranks"),
    ):
        model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(3, 5)) if "2" in plan else network()
        with pytest.raises(error, match=re.escape(words)):
            parallelize(model, mesh["tensor"], plan)
    model = network()
    model.layer[0].query.forward = lambda x: x
    with pytest.raises(ConflictError, match=r"layer\.0\.query, whose forward another opt has replaced"):
        parallelize(model, mesh["tensor"], PLAN)


def compiles(mesh: DeviceMesh) -> None:
    """With the sums of the backward pass, which torch.compile drops where they are not functional collectives."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    parallelize(model, mesh["tensor"], {"1": "column", "3": "row"})
    grads: list[list[Tensor]] = []
    for forward in (model, torch.compile(model, backend="aot_eager")):
        forward(torch.ones(3, 4)).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        model.zero_grad()
    torch.testing.assert_close(grads[1], grads[0])


if __name__ == "__main__":
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=4)
    torch.set_deterministic_debug_mode("error")
    SHAPES = {("data", "tensor"): (2, 2), ("shard", "tensor"): (2, 2), ("data", "shard"): (2, 2)}
    DDP, FSDP, HYBRID = (init_device_mesh("cpu", shape, mesh_dim_names=names) for names, shape in SHAPES.items())
    for name in ("lamb", "lars", "adamw_foreach"):
        trains_saves_and_resumes_as_one_rank(name, DDP)
    for name in ("lamb", "adamw"):
        trains_saves_and_resumes_as_one_rank(name, FSDP)
    for name in ("lamb", "sgd"):
        trains_saves_and_resumes_as_one_rank(name, HYBRID)
    ALL = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("data", "shard", "tensor"))
    trains_saves_and_resumes_as_one_rank("lamb", ALL)
    for each in (DDP, FSDP, HYBRID):
        each_rank_holds_its_share(each)
        evaluates_unequally_many_batches(each)
    for each in (DDP, FSDP):
        ranks_of_a_tensor_group_stay_the_same_bit_for_bit(each)
        gradients_are_cleared_without_a_step(each)
    dropout_draws_own_numbers_where_activations_are_split(DDP)
    a_plan_that_does_not_fit_is_refused(DDP)
    compiles(DDP)
    dist.destroy_process_group()
