"""The opt `zero_copy_concat`: layers that read the same input write into slices of one buffer."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.api.errors import NotOfferedError
from core.api.hooks import hookimpl
from core.api.types import Evidence, OptSpec, Plugin

if TYPE_CHECKING:
    from torch import nn

    from timetrial_zero_copy_concat.siblings import Siblings


@dataclass(kw_only=True)
class ZeroCopyConcatConfig:
    """Settings of `opt.zero_copy_concat`."""

    siblings: list[list[str]]
    """Names of linear layers that read the same input, where they are children of one module."""


class ZeroCopyConcat(Plugin):
    """One product for the projections of each attention layer, and one tensor for their input's gradient."""

    spec = OptSpec(
        interface=2,
        summary="query, key and value of attention as one product into slices of one buffer",
        numerics="tolerance",
        conflicts={
            "compile": "torch.compile lays out the buffers of its graphs itself",
            "fsdp": "the shards of different parameters cannot share one block of memory",
            "tensor_parallel": "the parts of different parameters cannot share one block of memory",
        },
    )
    Config = ZeroCopyConcatConfig
    config: ZeroCopyConcatConfig

    _found: list[Siblings]

    @hookimpl(wrapper=True)
    def prepare_model(self) -> Generator[None, nn.Module, nn.Module]:
        from timetrial_zero_copy_concat.siblings import find

        model = yield
        self._found = find(model, self.config.siblings)
        if not self._found:
            families = " or ".join(", ".join(names) for names in self.config.siblings)
            what = f"opt 'zero_copy_concat': the model of this workload has no sibling linear layers named {families}"
            raise NotOfferedError(f"{what}; leave it out, or name others in opt.zero_copy_concat.siblings")
        return model

    @hookimpl
    def verify(self) -> Evidence:
        used = [siblings for siblings in self._found if siblings.bytes_saved]
        saved = sum(siblings.bytes_saved for siblings in used)
        layers = sum(len(siblings.sizes) for siblings in self._found)
        return Evidence(
            plugin="zero_copy_concat",
            active=len(used) == len(self._found),
            summary=f"{layers} linear layers in {len(self._found)} products, {len(used)} of which ran in training; "
            f"{saved / 2**20:.1f} MiB per pass neither copied nor summed separately",
            figures={"layers": layers, "products": len(self._found), "used": len(used), "bytes_saved_per_pass": saved},
        )
