"""The opt `ddp`: every data rank holds the whole model, and gradients are averaged in the backward pass."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.seams import GRADIENT_BUCKETS, GRADIENT_EXCHANGE
from core.api.types import Evidence, OptSpec, Plugin, RunContext

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

MIB = 2**20


@dataclass(kw_only=True)
class DdpConfig:
    """Settings of `opt.ddp`."""

    bucket_cap_mib: float = checked(above=0)
    """MiB of gradients that are exchanged together during the backward pass."""


class Ddp(Plugin):
    """Wraps the model in DistributedDataParallel and offers its buckets and its exchange to other opts."""

    spec = OptSpec(
        interface=2,
        summary="gradients averaged over data ranks by DistributedDataParallel; the default with several",
        requires=frozenset({"process_group"}),
        numerics="tolerance",
        claims=frozenset({"gradient_exchange"}),
        wraps=frozenset({"tensor_parallel"}),  # each rank exchanges the gradients of its own part of a layer
    )
    Config = DdpConfig
    config: DdpConfig

    _wrapped: DistributedDataParallel | None = None

    @hookimpl(wrapper=True)
    def distribute(self, ctx: RunContext) -> Generator[None, nn.Module, nn.Module]:
        from torch.nn.parallel import DistributedDataParallel

        model = yield
        # Buffers are not broadcast from rank 0 at each forward pass, torch's default: that costs a collective a step,
        # throws away what the other ranks saw, and is of no use where ranks compute equal buffers.
        plain = {"bucket_cap_mb": self.config.bucket_cap_mib, "bucket_at_least_mb": 0.0, "broadcast_buffers": False}
        settings = dict(ctx.offer(GRADIENT_BUCKETS, plain))
        settings["bucket_cap_mb"] = max(settings["bucket_cap_mb"], settings.pop("bucket_at_least_mb"))
        on_cpu = ctx.device.type == "cpu"
        self._wrapped = DistributedDataParallel(
            model,
            device_ids=None if on_cpu else [ctx.device.index],
            process_group=ctx.mesh.device_mesh(ctx.device.type)["data"].get_group(),
            **settings,
        )
        exchange = ctx.offer(GRADIENT_EXCHANGE, None)
        if exchange is not None:
            self._wrapped.register_comm_hook(*exchange)
        return self._wrapped

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        if self._wrapped is None:
            return Evidence(plugin="ddp", active=False, summary="no model has been wrapped")
        ranks = ctx.mesh.size("data")
        cap = self._wrapped.bucket_bytes_cap / MIB  # as it is, not as asked for
        return Evidence(
            plugin="ddp",
            active=True,
            summary=f"gradients averaged over {ranks} data rank{'s' * (ranks != 1)} in buckets of {cap:.3g} MiB",
            figures={"data_ranks": ranks, "bucket_cap_mib": cap},
            numerics="bitwise" if ranks == 1 else None,
        )
