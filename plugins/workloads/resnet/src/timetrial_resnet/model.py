"""Residual networks from torchvision's own blocks, and their names in the closed rules.

He et al. (2015), arXiv:1512.03385; torchvision's Bottleneck has its stride in the 3x3 convolution, which is v1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

Norm = Callable[[int], nn.Module]

# Blocks in each stage. 18, 34 and 50 are the paper's table 1; 8 and 14 have one stage less, for small images.
STAGES: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet8": (BasicBlock, [1, 1, 1]),
    "resnet14": (BasicBlock, [2, 2, 2]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}

FC_STD = 0.01
"""Reference (TensorFlow 1): mlcommons/training, image_classification/tensorflow/official/resnet/resnet_model.py."""

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a unit normal cut off at 2, by which TensorFlow's variance_scaling_initializer divides."""


class ResNet(nn.Module):
    """images [B, channels, H, W] float -> logits [B, classes].

    With arch resnet18/34/50, width 64 and the `imagenet` stem, it is torchvision's model under its parameter names.
    `norm` makes the normalisation layer for a number of channels.
    """

    def __init__(self, arch: str, *, width: int, stem: str, channels: int, classes: int, norm: Norm) -> None:
        super().__init__()
        block, depths = STAGES[arch]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = norm(width)
        inputs, self.stages = width, []
        for number, depth in enumerate(depths):
            planes, stride = width * 2**number, 1 if number == 0 else 2
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = stride if position == 0 else 1
                shortcut = None
                if stride != 1 or inputs != planes * block.expansion:
                    conv = nn.Conv2d(inputs, planes * block.expansion, 1, stride=stride, bias=False)
                    shortcut = nn.Sequential(conv, norm(planes * block.expansion))
                blocks.append(block(inputs, planes, stride, shortcut, norm_layer=norm))
                inputs = planes * block.expansion
            self.stages.append(f"layer{number + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(images_BCHW))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc(x.mean((2, 3)))


@torch.no_grad()
def initialise(model: nn.Module, init: str, zero_init_residual: bool, generator: torch.Generator) -> None:
    """Fills every parameter from `generator`.

    `torchvision`: convolutions normal with variance 2 / fan-out, classifier as nn.Linear. `reference`: convolutions
    truncated normal with variance 1 / fan-in, classifier normal with FC_STD, its bias 0 (see FC_STD for the source).
    Batch normalisation starts at gamma 1, beta 0; with `zero_init_residual` the last gamma of each block starts at 0
    (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if init == "reference":
                std = math.sqrt(1 / module.weight[0].numel()) / TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            else:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            if init == "reference":
                nn.init.normal_(module.weight, std=FC_STD, generator=generator)
                nn.init.zeros_(module.bias)
            else:
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)  # pyright: ignore[reportArgumentType]


def closed_names(model: nn.Module) -> list[str]:
    """The parameters' names as the closed rules spell them, after the MXNet model of the first submissions, in the
    order of `model.named_parameters()`: layer1.0.downsample.0.weight is stage1_unit1_conv1sc_weight."""
    return [_closed_name(name) for name, _ in model.named_parameters()]


def _closed_name(name: str) -> str:
    parts = name.split(".")
    kind = parts[-1]
    if parts[0] == "fc":
        return f"fc1_{kind}"
    batch_norm = {"weight": "gamma", "bias": "beta"}[kind]
    if parts[0] == "conv1":
        return "conv0_weight"
    if parts[0] == "bn1":
        return f"bn0_{batch_norm}"
    unit = f"stage{parts[0].removeprefix('layer')}_unit{int(parts[1]) + 1}"
    if parts[2] == "downsample":
        return f"{unit}_conv1sc_weight" if parts[3] == "0" else f"{unit}_bnsc_{batch_norm}"
    return f"{unit}_{parts[2]}_{'weight' if parts[2].startswith('conv') else batch_norm}"
