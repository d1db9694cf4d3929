"""Layers put together must be the layers apart, with less traffic between them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from core.api.errors import NotOfferedError, UsageError
from core.testing.contexts import hooks_of
from timetrial_zero_copy_concat.plugin import ZeroCopyConcat, ZeroCopyConcatConfig
from timetrial_zero_copy_concat.siblings import bytes_saved, find

pytestmark = pytest.mark.numbers

NAMES = [["query", "key", "value"]]
ROWS, LENGTH, SIZE, HEADS = 3, 5, 8, 2


class Attention(nn.Module):
    def __init__(self, bias: bool = True, value_size: int = SIZE) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(SIZE, SIZE, bias=bias) for _ in range(2))
        self.value = nn.Linear(SIZE, value_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:-1], HEADS, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def prepared(model: nn.Module) -> ZeroCopyConcat:
    plugin = ZeroCopyConcat(ZeroCopyConcatConfig(siblings=NAMES))
    assert hooks_of(plugin).prepare_model(ctx=None, model=model) is model
    return plugin


def attention(**settings: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(**settings)


def source() -> Tensor:
    return torch.randn(ROWS, LENGTH, SIZE, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"value_size": 2 * SIZE}])
def test_outputs_and_gradients_are_those_of_the_layers_apart(settings: dict[str, Any]) -> None:
    apart, together = attention(**settings), attention(**settings)
    prepared(together)
    x, y = source(), source()
    apart(x).square().sum().backward()
    together(y).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    for (name, mine), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_gradients_agree_with_finite_differences() -> None:
    model = Attention().double()
    prepared(model)
    x = torch.randn(2, 3, SIZE, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]
    reference = copy.copy(dict(zip([n for n, _ in model.named_parameters()], values, strict=True)))
    expected = torch.autograd.grad(torch.func.functional_call(Attention().double(), reference, x).sum(), values)
    model(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_parameters_keep_their_names_and_identity_and_take_a_checkpoint_in_place() -> None:
    model, other = attention(), Attention()
    before = dict(model.named_parameters())
    prepared(model)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(other.state_dict())
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(source()), other(source()))


def test_an_optimizer_that_updates_in_place_is_seen_by_the_next_product() -> None:
    apart, together = attention(), attention()
    prepared(together)
    for model in (apart, together):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
        for _ in range(3):
            model(source()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_outputs_are_slices_of_one_buffer() -> None:
    model = attention()
    prepared(model)
    x = source()
    outputs = [model.query(x), model.key(x), model.value(x)]
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == 1


class Counting(TorchDispatchMode):
    """Operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, autocast: bool) -> Counter[str]:
    with Counting() as counting:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = model(source())
        y.sum().backward()
    return counting.seen


def test_nothing_is_summed_or_copied_that_was_not_before() -> None:
    apart, together = operations(attention(), False), attention()
    prepared(together)
    less = operations(together, False)
    assert apart["add"] + apart["add_"] == 2  # of the three gradients of the input
    assert less["add"] + less["add_"] == 0
    assert less["addmm"] == 1  # forward
    copying = ("clone", "copy_", "cat", "_to_copy")
    assert sum(less[name] for name in copying) <= sum(apart[name] for name in copying)


def test_under_autocast_the_input_is_converted_once_and_back_once() -> None:
    apart, together = operations(attention(), True), attention()
    prepared(together)
    less = operations(together, True)
    assert less["_to_copy"] < apart["_to_copy"]


def test_under_autocast_the_results_are_those_of_the_layers_apart() -> None:
    apart, together = attention(), attention()
    prepared(together)
    for model in (apart, together):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(source())
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    for mine, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.05, atol=0.05)


def test_a_parameter_that_is_changed_before_the_backward_pass_is_noticed() -> None:
    model = attention()
    prepared(model)
    y = model(source())
    with torch.no_grad():
        model.key.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_layers_that_read_different_inputs_are_refused() -> None:
    model = attention()
    prepared(model)
    model.query(source())
    with pytest.raises(UsageError, match="do not read the same input"):
        model.key(source())


def test_parameters_that_another_moves_are_refused() -> None:
    model = attention()
    prepared(model)
    model.query.weight.data = model.query.weight.data.clone()
    with pytest.raises(UsageError, match="have been moved"):
        model(source())


def test_only_plain_linear_layers_of_equal_input_are_put_together() -> None:
    class Low(nn.Linear):
        pass

    mixed = attention()
    mixed.key = nn.Linear(SIZE, SIZE, bias=False)
    special = attention()
    special.key = Low(SIZE, SIZE)
    narrow = attention()
    narrow.key = nn.Linear(SIZE // 2, SIZE)
    for model in (mixed, special, narrow, nn.Linear(2, 2)):
        assert find(model, NAMES) == []
    assert len(find(nn.Sequential(attention(), attention()), NAMES)) == 2


def test_evidence_counts_what_a_training_pass_saved() -> None:
    model = nn.Sequential(attention(), attention())
    plugin = prepared(model)
    with torch.no_grad():
        model(source())
    assert not plugin.verify().active
    model(source())
    evidence = plugin.verify()
    assert evidence.active
    elements = ROWS * LENGTH * SIZE
    assert evidence.figures["bytes_saved_per_pass"] == 2 * (2 * elements * (3 * 4 - 4))
    assert bytes_saved(3, elements, 4, 2) == 2 * elements * (3 * 4 + 2 * (4 + 2) - 2)


def test_a_model_without_such_layers_has_nothing_to_offer() -> None:
    with pytest.raises(NotOfferedError, match="no sibling linear layers named query, key, value"):
        prepared(nn.Linear(2, 2))
