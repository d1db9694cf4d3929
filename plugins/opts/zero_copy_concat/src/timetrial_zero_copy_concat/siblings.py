"""Linear layers that read the same input: one product, whose slices are their outputs.

Shape suffixes: N rows of the input (all its dimensions but the last), I input features, O output features of all the
layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from core.api.errors import UsageError


class Siblings:
    """Replaces the `forward` of linear layers. Their parameters stay the objects that they are, under their names; but
    their values are moved to one contiguous block of memory, which a single product reads.

    The first layer that is called computes all; the others return their slices. UsageError where they turn out not
    to be called with the same tensor, once each.
    """

    def __init__(self, name: str, layers: Sequence[nn.Linear]) -> None:
        self.name = name
        self.sizes = [layer.out_features for layer in layers]
        self.parameters: list[nn.Parameter] = [layer.weight for layer in layers]
        self.weight_OI = joined(self.parameters)
        self.bias_O: Tensor | None = None
        if layers[0].bias is not None:
            biases = [layer.bias for layer in layers]
            self.bias_O = joined(biases)
            self.parameters += biases
        self.bytes_saved = 0
        """By the last pass with gradients (`bytes_saved`)."""
        self._pending: tuple[Tensor, dict[int, Tensor]] | None = None
        for number, layer in enumerate(layers):
            layer.forward = partial(self._forward, number)

    def _forward(self, number: int, x: Tensor) -> Tensor:
        if self._pending is None:
            self._pending = x, dict(enumerate(self._outputs(x)))
        source, outputs = self._pending
        if x is not source or number not in outputs:
            raise UsageError(
                f"opt 'zero_copy_concat': the layers of {self.name} do not read the same input: "
                "take them out of opt.zero_copy_concat.siblings"
            )
        if len(outputs) == 1:
            self._pending = None
        return outputs.pop(number)

    def _outputs(self, x: Tensor) -> Sequence[Tensor]:
        if self.parameters[0].data_ptr() != self.weight_OI.data_ptr():
            raise UsageError(f"opt 'zero_copy_concat': the parameters of {self.name} have been moved; leave it out")
        weight_OI, bias_O, wide = self.weight_OI, self.bias_O, x.dtype
        if torch.is_autocast_enabled(x.device.type):
            narrow = torch.get_autocast_dtype(x.device.type)
            x, weight_OI = x.to(narrow), weight_OI.to(narrow)
            bias_O = None if bias_O is None else bias_O.to(narrow)
        if torch.is_grad_enabled():
            self.bytes_saved = bytes_saved(len(self.sizes), x.numel(), wide.itemsize, x.dtype.itemsize)
        return _Products.apply(x, weight_OI, bias_O, self.sizes, *self.parameters)  # pyright: ignore[reportReturnType]


class _Products(torch.autograd.Function):
    """x W^T + b for all layers at once. Backward, each layer's product adds to the gradient of x in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, sizes: list[int], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        # The parameters are saved so that autograd notices if one is changed before the backward pass.
        ctx.save_for_backward(x, *parameters)
        ctx.weight_OI, ctx.sizes, ctx.has_bias = weight_OI, sizes, bias_O is not None
        return F.linear(x, weight_OI, bias_O).split(sizes, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        x_NI = x.reshape(-1, x.shape[-1])
        dx_NI: Tensor | None = None
        d_weights, d_biases = list[Tensor](), list[Tensor]()
        for gradient, weight in zip(gradients, ctx.weight_OI.split(ctx.sizes), strict=True):
            dy = gradient.reshape(-1, gradient.shape[-1])
            if ctx.needs_input_grad[0]:
                dx_NI = dy @ weight if dx_NI is None else dx_NI.addmm_(dy, weight)
            d_weights.append(dy.t() @ x_NI)
            if ctx.has_bias:
                d_biases.append(dy.sum(0))
        d_parameters = (d.to(p.dtype) for d, p in zip((*d_weights, *d_biases), parameters, strict=True))
        return (None if dx_NI is None else dx_NI.view(x.shape), None, None, None, *d_parameters)


def joined(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One tensor with the values of all, along dimension 0; each parameter becomes a name for its part of it."""
    whole = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return whole


def bytes_saved(layers: int, elements: int, wide: int, narrow: int) -> int:
    """Memory traffic that one forward and backward pass avoids, in bytes.

    The layers apart: autograd sums the gradients of their common input, of `elements` elements of `wide` bytes, with
    `layers` - 1 additions that read two tensors and write one; under autocast each also converts the input to `narrow`
    bytes, and its gradient back. Together: one conversion each way, and `layers` - 1 products that read what they add
    to.
    """
    additions, conversions = 3 * wide, 2 * (wide + narrow) if narrow != wide else 0
    return (layers - 1) * elements * (additions + conversions - narrow)


def find(model: nn.Module, names: Sequence[Sequence[str]]) -> list[Siblings]:
    """Puts together, everywhere in `model`, children of one module that have the names of one of the lists, if they are
    plain linear layers of equal input size, all with a bias or all without."""
    found: list[Siblings] = []
    for prefix, module in model.named_modules():
        children = dict(module.named_children())
        for family in names:
            layers = [children[name] for name in family if name in children]
            if len(layers) == len(family) and alike(layers):
                found.append(Siblings(f"{prefix or 'the model'} ({', '.join(family)})", layers))
    return found


def alike(layers: Sequence[nn.Module]) -> bool:
    """Whether one product can replace all of them."""
    shapes = {(type(m), m.in_features, m.bias is None, m.weight.dtype) for m in layers if isinstance(m, nn.Linear)}
    return len(layers) > 1 and all(type(m) is nn.Linear for m in layers) and len(shapes) == 1
