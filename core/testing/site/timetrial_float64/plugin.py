"""The opt `float64`, for the conformance kit only: the model, the optimizer's state and the batches in float64.

Where a search picks a move or a detector a region, the last bit of a float32 can pick another one, and runs that should
agree part. In float64 the roundings are a billion times smaller: what is still different is a defect.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.hooks import hookimpl
from core.api.seams import INFER, LOSS, Replacement
from core.api.types import Evidence, OptSpec, Plugin

if TYPE_CHECKING:
    from torch import nn

    from core.api.types import RunContext


@dataclass(kw_only=True)
class Float64Config:
    pass


class Float64(Plugin):
    spec = OptSpec(
        interface=2, summary="float64 throughout, for tests", numerics="changes", replaces=frozenset({LOSS, INFER})
    )
    Config = Float64Config

    @hookimpl(wrapper=True)
    def prepare_model(self) -> Generator[None, nn.Module, nn.Module]:
        return (yield).double()

    @hookimpl
    def replace(self) -> list[Replacement[Any]]:
        return [LOSS.by(_in_float64), INFER.by(_in_float64)]

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        import torch

        active = all(p.dtype == torch.float64 for p in ctx.model.parameters())
        return Evidence(plugin="float64", active=active, summary="every parameter is float64")


def _in_float64(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Of `(model, data)`, with the floating-point tensors of `data` in float64."""
    import torch

    from core.api.tree import map_tensors

    def doubled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return lambda model, data: function(model, map_tensors(doubled, data))
