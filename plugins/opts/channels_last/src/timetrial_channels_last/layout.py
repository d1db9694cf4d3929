"""Channels-last memory format for weights and batches, and a check that convolutions keep it.

N, C, H, W: examples, channels, height, width. The order of the dimensions stays; that of the bytes becomes N, H, W, C.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from core.api.tree import map_tensors, tensors
from core.api.types import Batch

_PROBE_SIZE = 32
"""Height and width of the probe image: wider than any usual kernel, so that its layout is unambiguous."""


def convert_weights(model: nn.Module) -> nn.Module:
    """Lays out the 4-D parameters and buffers in place. `Module.to` would refuse a model that has 5-D ones as well."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.dim() == 4:
            # Not `contiguous`, which keeps the strides of a 1x1 kernel: gradients come with those of channels-last, and
            # DistributedDataParallel warns, and copies, where a gradient's strides are not its parameter's.
            tensor.data = torch.empty_like(tensor.data, memory_format=torch.channels_last).copy_(tensor.data)
    return model


def is_image(tensor: Tensor) -> bool:
    """Whether this is a batch (N, C, H, W) of floating-point images or features."""
    return tensor.dim() == 4 and tensor.is_floating_point()


def convert_data(data: Any) -> Any:
    """The pytree `data` with its images channels-last; an image that is so already is not copied."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if is_image(tensor) else tensor

    return map_tensors(convert, data)


class Batches:
    """`batches` with channels-last images; `images` counts those of the first batch, before and after."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches
        self.images: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            data = convert_data(batch.data)
            if self.images is None:
                self.images = sum(map(is_image, tensors(data)))
            yield replace(batch, data=data)


def share_of_weights(model: nn.Module) -> tuple[int, int]:
    """(channels-last, all) 4-D parameters of the model as it stands now."""
    weights = [p for p in model.parameters() if p.dim() == 4]
    return sum(w.is_contiguous(memory_format=torch.channels_last) for w in weights), len(weights)


@torch.no_grad()
def probe(model: nn.Module) -> bool | None:
    """Whether a convolution of the model gives a channels-last result for a channels-last image of zeros.

    None where every convolution reads or gives a single channel, for which the two layouts are the same.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and min(module.in_channels, module.out_channels) > 1:
            shape = (2, module.in_channels, _PROBE_SIZE, _PROBE_SIZE)
            image_NCHW = module.weight.new_zeros(shape).contiguous(memory_format=torch.channels_last)
            result = module._conv_forward(image_NCHW, module.weight, module.bias)  # without hooks: it leaves no trace
            return result.is_contiguous(memory_format=torch.channels_last) and not result.is_contiguous()
    return None
