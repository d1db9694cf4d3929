"""The gloo backend: any number of ranks on CPUs, through torch.distributed."""

from __future__ import annotations

from collections.abc import Generator

from core.api.hooks import hookimpl
from core.api.types import Backend, BackendSpec, Devices, Evaluate, Evidence, Plugin, RunContext
from timetrial_torchdist.config import NoSettings


def probe() -> Devices:
    """CPUs serve any number of ranks: more ranks than cores are slow, not wrong."""
    return Devices(provides=frozenset({"cpu", "process_group"}), count=None)


class Gloo(Plugin):
    """Ranks on CPUs, joined by gloo."""

    spec = BackendSpec(interface=2, summary="ranks on CPUs, joined by gloo (any machine)", probe=probe, preference=10)
    Config = NoSettings

    @hookimpl
    def init_backend(self, ctx: RunContext) -> Backend:
        import torch

        from timetrial_torchdist import process_group

        return process_group.join("gloo", torch.device("cpu"), ctx.config.launch.timeout_s)

    @hookimpl(wrapper=True)
    def wrap_evaluate(self, ctx: RunContext) -> Generator[None, Evaluate, Evaluate]:
        from timetrial_torchdist.buffers import evaluate_alike

        return evaluate_alike(ctx, (yield))

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        from timetrial_torchdist.process_group import ranks_joined

        ranks = ranks_joined()
        return Evidence(
            plugin="gloo",
            active=ranks == ctx.world_size,
            summary=f"{ranks} rank{'s' * (ranks != 1)} on the CPU joined",
            figures={"world_size": ranks},
        )
