"""The gloo backend: any number of ranks on CPUs, through torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.types import Backend, BackendSpec, Devices, Evidence, Forward, Plugin, RunContext

if TYPE_CHECKING:
    from torch import nn

Evaluate = Callable[[Forward], dict[str, float]]


def probe() -> Devices:
    """CPUs serve any number of ranks: more ranks than cores are slow, not wrong."""
    return Devices(provides=frozenset({"cpu"}), count=None)


@dataclass(kw_only=True)
class GlooConfig:
    """Settings of `backend=gloo`."""

    RENAMED: ClassVar[Mapping[str, str]] = {"bucket_cap_mb": "bucket_cap_mib"}

    ddp: str = checked(choices=("auto", "always"))
    """`auto` leaves one rank's model bare; `always` wraps it in DistributedDataParallel, to see what that costs."""
    bucket_cap_mib: float = checked(above=0)
    """MiB of gradients that are exchanged together while the backward pass goes on."""


class Gloo(Plugin):
    """Ranks on CPUs, joined by gloo."""

    spec = BackendSpec(interface=1, summary="ranks on CPUs, joined by gloo (any machine)", probe=probe, preference=10)
    Config = GlooConfig
    config: GlooConfig

    @hookimpl
    def init_backend(self, ctx: RunContext) -> Backend:
        import torch

        from timetrial_gloo import process_group

        return process_group.join("gloo", torch.device("cpu"), ctx.config.launch.timeout_s)

    @hookimpl
    def distribute(self, ctx: RunContext, model: nn.Module) -> nn.Module:
        from timetrial_gloo import process_group

        if ctx.world_size == 1 and self.config.ddp == "auto":
            return model
        settings = ctx.component("ddp", {"bucket_cap_mb": self.config.bucket_cap_mib})
        return process_group.distribute(model, ctx.device, **settings)

    @hookimpl(wrapper=True)
    def wrap_evaluate(self, ctx: RunContext) -> Generator[None, Evaluate, Evaluate]:
        from timetrial_gloo import process_group

        evaluate = yield
        if ctx.world_size == 1:
            return evaluate

        def evaluate_alike(infer: Forward) -> dict[str, float]:
            process_group.average_buffers(ctx.model)  # every rank must evaluate the same model
            return evaluate(infer)

        return evaluate_alike

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        from torch.distributed.fsdp import FSDPModule
        from torch.nn.parallel import DistributedDataParallel

        wrapped = [m for m in ctx.distributed_model.modules() if isinstance(m, DistributedDataParallel)]
        ddp, cap = bool(wrapped), wrapped[0].bucket_bytes_cap / 2**20 if wrapped else None  # as it is, not as asked for
        sharded = isinstance(ctx.distributed_model, FSDPModule)
        exchange = "by DistributedDataParallel" if ddp else "by fully_shard" if sharded else ""
        ranks = f"{ctx.world_size} rank{'s' * (ctx.world_size > 1)}"
        return Evidence(
            plugin="gloo",
            active=bool(exchange) or ctx.world_size == 1,
            summary=f"{ranks} on the CPU joined; "
            f"gradients are {f'averaged {exchange}' if exchange else 'not exchanged'}",
            figures={"world_size": ctx.world_size, "ddp": ddp, "bucket_cap_mib": cap},
        )
