"""The opt `channels_last`: the memory format in which most fast convolution kernels work."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.api.errors import NotOfferedError
from core.api.hooks import hookimpl
from core.api.types import Batch, Evidence, OptSpec, Plugin, Purpose, RunContext

if TYPE_CHECKING:
    from torch import nn

    from timetrial_channels_last.layout import Batches


@dataclass(kw_only=True)
class ChannelsLastConfig:
    """It has no settings."""


class ChannelsLast(Plugin):
    """Keeps convolution weights and images with the channels innermost."""

    spec = OptSpec(interface=2, summary="images and convolution weights in channels-last layout", numerics="tolerance")
    Config = ChannelsLastConfig
    config: ChannelsLastConfig

    _batches: Batches | None = None

    @hookimpl(wrapper=True)
    def prepare_model(self) -> Generator[None, nn.Module, nn.Module]:
        from timetrial_channels_last.layout import convert_weights, share_of_weights

        model = yield
        if share_of_weights(model)[1] == 0:
            raise NotOfferedError("opt 'channels_last' does not apply here: the model has no 4-D weights; leave it out")
        return convert_weights(model)

    @hookimpl(wrapper=True)
    def transform(self, purpose: Purpose) -> Generator[None, Iterable[Batch], Iterable[Batch]]:
        from timetrial_channels_last.layout import Batches

        converted = Batches((yield))
        if purpose != "evaluate":
            self._batches = converted
        return converted

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        from timetrial_channels_last.layout import probe, share_of_weights

        converted, weights = share_of_weights(ctx.model)
        kept = probe(ctx.model)
        images = self._batches.images if self._batches else None
        parts = [f"{converted} of {weights} 4-D weights are channels-last"]
        if kept is not None:
            parts.append(f"a convolution of the model {'keeps' if kept else 'loses'} the layout")
        if images is not None:
            parts.append(f"{images} tensor{'s' * (images != 1)} of a batch converted")
        return Evidence(
            plugin="channels_last",
            active=converted == weights > 0 and kept is not False and images != 0,
            summary="; ".join(parts),
            figures={"weights": weights, "weights_channels_last": converted, "probe_kept": kept, "images": images},
        )
