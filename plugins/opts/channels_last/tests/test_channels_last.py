"""Channels-last layout of weights and batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
from torch import Tensor, nn

from core.api.hooks import PROJECT, Hooks, hookimpl
from core.api.types import Batch
from core.testing.cli import run_cli
from timetrial_channels_last.layout import convert_data, convert_weights, probe, share_of_weights
from timetrial_channels_last.plugin import ChannelsLast, ChannelsLastConfig


def channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2))


class Baseline:
    @hookimpl
    def prepare_model(self, model: Any) -> Any:
        return model

    @hookimpl
    def transform(self, batches: Any) -> Any:
        return batches


@pytest.fixture
def composed() -> tuple[ChannelsLast, Any]:
    manager, plugin = pluggy.PluginManager(PROJECT), ChannelsLast(ChannelsLastConfig())
    manager.add_hookspecs(Hooks)
    manager.register(Baseline())
    manager.register(plugin)
    return plugin, manager.hook


def test_it_converts_model_and_batches_and_proves_it(composed: tuple[ChannelsLast, Any]) -> None:
    plugin, hook = composed
    model, ctx = network(), SimpleNamespace()
    ctx.model = hook.prepare_model(ctx=ctx, model=model)
    assert ctx.model is model
    batch = Batch({"images": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}, samples=2, weight=0.5)
    (converted,) = hook.transform(ctx=ctx, batches=[batch], purpose="train")
    assert channels_last(converted.data["images"])
    assert torch.equal(converted.data["images"], batch.data["images"])
    assert (converted.samples, converted.weight) == (2, 0.5)
    evidence = plugin.verify(ctx)
    assert evidence.active
    assert evidence.figures["weights"] == evidence.figures["weights_channels_last"] == 2


def test_evaluation_is_converted_too_and_counted_by_training_alone(composed: tuple[ChannelsLast, Any]) -> None:
    plugin, hook = composed
    ctx = SimpleNamespace()
    ctx.model = hook.prepare_model(ctx=ctx, model=network())
    two, one = ([torch.randn(2, 3, 8, 8)] * number for number in (2, 1))
    list(hook.transform(ctx=ctx, batches=[Batch(two, samples=2)], purpose="train"))
    (converted,) = hook.transform(ctx=ctx, batches=[Batch(one, samples=0)], purpose="evaluate")
    assert channels_last(converted.data[0])
    assert plugin.verify(ctx).figures["images"] == 2


def test_values_and_names_stay() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = convert_weights(model).state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_with_3d_convolutions_too_is_converted_where_it_can_be() -> None:
    model = convert_weights(nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv3d(3, 8, 3)]))
    assert share_of_weights(model) == (1, 1)


def test_1x1_kernels_get_the_strides_that_their_gradients_will_have() -> None:
    weight = convert_weights(nn.Conv2d(6, 8, 1)).weight
    assert (
        weight.stride()
        == torch.empty(8, 6, 1, 1).to(memory_format=torch.channels_last, copy=True).stride()
        == (6, 1, 6, 6)
    )


def test_only_4d_floating_point_tensors_are_converted() -> None:
    data = {
        "points": torch.randn(2, 3),
        "masks": torch.zeros(2, 3, 4, 4, dtype=torch.int64),
        "images": [torch.randn(2, 3, 4, 4)],
        "n": 3,
    }
    converted = convert_data(data)
    assert converted["points"] is data["points"]
    assert converted["masks"].is_contiguous()
    assert channels_last(converted["images"][0])
    assert converted["n"] == 3


def test_the_probe_tells_the_layouts_apart_and_leaves_no_trace() -> None:
    model = network().train()
    mean = model[1].running_mean.clone()
    assert probe(convert_weights(model)) is True
    assert torch.equal(model[1].running_mean, mean)
    assert probe(nn.Linear(2, 2)) is None
    assert probe(nn.Conv2d(1, 8, 3)) is None


def test_a_model_without_convolutions_is_no_evidence(composed: tuple[ChannelsLast, Any]) -> None:
    plugin, hook = composed
    ctx = SimpleNamespace(model=nn.Linear(2, 2))
    list(hook.transform(ctx=ctx, batches=[Batch(torch.randn(2, 2), samples=2)], purpose="train"))
    assert not plugin.verify(ctx).active


def test_a_model_without_convolutions_is_refused(tmp_path: Path) -> None:
    outcome = run_cli("workload=toy", "+opt=channels_last", run_dir=tmp_path / "run").expect(2)
    assert outcome.failure == "not_offered"
