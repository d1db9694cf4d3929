"""The models: torchvision's where it has them, and the names and log keys of the closed rules."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import mlperf_logging
import pytest
import torch
import torchvision
from torch import nn

from timetrial_resnet.model import ResNet
from timetrial_resnet.workload import ResNetWorkload

pytestmark = pytest.mark.numbers

MakeWorkload = Callable[..., ResNetWorkload]

RULES = Path(mlperf_logging.__file__).parent / "compliance_checker" / "training_1.1.0"


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_standard_networks_are_torchvisions(arch: str) -> None:
    ours = ResNet(arch, width=64, stem="imagenet", channels=3, classes=1000, norm=nn.BatchNorm2d).eval()
    theirs = getattr(torchvision.models, arch)().eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_weight_names_are_those_of_the_closed_rules(make: MakeWorkload) -> None:
    workload = make("resnet_mlperf", source="synthetic")
    with torch.device("meta"):
        model = ResNet("resnet50", width=64, stem="imagenet", channels=3, classes=1000, norm=nn.BatchNorm2d)
    text = (RULES / "closed_resnet.yaml").read_text()
    expected = re.findall(r'"(\w+_(?:weight|bias|gamma|beta))"', text)
    assert len(expected) == 161
    assert sorted(workload.weight_names(model)) == sorted(expected)


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_log_has_every_key_of_the_closed_rules(make: MakeWorkload, optimizer: str) -> None:
    workload = make("resnet_mlperf", f"optimizer={optimizer}", source="synthetic")
    wanted = set(re.findall(r"NAME:\s+(\w+)", (RULES / f"closed_resnet_{optimizer}.yaml").read_text()))
    assert wanted <= set(workload.log_values())


def test_initial_weights_depend_on_the_seed_alone(make: MakeWorkload) -> None:
    first, again, other = (
        make("resnet", seed=s, rank=r, world=w).build_model() for s, r, w in ((1, 0, 1), (1, 1, 2), (2, 0, 1))
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.get_parameter("conv1.weight"), other.get_parameter("conv1.weight"))


def test_reference_initialisation(make: MakeWorkload) -> None:
    model = make("resnet_mlperf", "arch=resnet18", "zero_init_residual=true", source="synthetic").build_model()
    weight = model.get_parameter("layer4.1.conv2.weight")
    assert weight.std().item() == pytest.approx((1 / (512 * 9)) ** 0.5, rel=0.01)
    assert model.get_parameter("fc.weight").std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.get_parameter("fc.bias").any()
    assert not model.get_parameter("layer1.0.bn2.weight").any()
    assert bool((model.get_parameter("layer1.0.bn1.weight") == 1).all())


def test_loss_passes_over_unreadable_images(make: MakeWorkload) -> None:
    workload = make("resnet_mlperf", source="synthetic")
    logits = torch.randn(4, 1000)
    labels = torch.tensor([3, -100, 5, 7])
    loss = workload.loss(nn.Identity(), (logits, labels))["loss"]
    readable = [0, 2, 3]
    expected = nn.functional.cross_entropy(logits[readable], labels[readable], label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    assert workload.loss(nn.Identity(), (logits, torch.full((4,), -100)))["loss"] == 0


def test_the_example_batch_touches_no_file(make: MakeWorkload) -> None:
    workload = make("resnet_mlperf", "global_batch_size=4", "image_size=32", source="synthetic", world=2)
    (batch,) = workload.example_batches()
    assert batch.data[0].shape == (2, 3, 32, 32) and batch.data[1].max() < 1000
    assert (batch.samples, batch.weight) == (4, 1.0)
