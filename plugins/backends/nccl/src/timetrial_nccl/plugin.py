"""The NCCL backend: one rank for each NVIDIA GPU, through torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from core.api.config import RunConfig, checked
from core.api.errors import UsageError
from core.api.hooks import hookimpl
from core.api.types import Backend, BackendSpec, Evidence, Forward, Plugin, RunContext
from timetrial_nccl.devices import probe

if TYPE_CHECKING:
    from torch import nn

Evaluate = Callable[[Forward], dict[str, float]]


@dataclass(kw_only=True)
class NcclConfig:
    """Settings of `backend=nccl`."""

    RENAMED: ClassVar[Mapping[str, str]] = {"bucket_cap_mb": "bucket_cap_mib"}

    ddp: str = checked(choices=("auto", "always"))
    """`auto` leaves one rank's model bare; `always` wraps it in DistributedDataParallel, to see what that costs."""
    bucket_cap_mib: float = checked(above=0)
    """MiB of gradients that are exchanged together while the backward pass goes on."""


class Nccl(Plugin):
    """Ranks on NVIDIA GPUs, joined by NCCL; a gloo group beside it carries plain numbers without touching the GPU."""

    spec = BackendSpec(interface=1, summary="one rank for each NVIDIA GPU, joined by NCCL", probe=probe, preference=20)
    Config = NcclConfig
    config: NcclConfig

    @hookimpl
    def environment(self, config: RunConfig) -> dict[str, str]:
        # cuBLAS needs a fixed workspace to give the same bits (its guide, "Results reproducibility").
        return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if config.deterministic else {}

    @hookimpl
    def init_backend(self, ctx: RunContext) -> Backend:
        import torch

        from timetrial_nccl import process_group

        local_rank, count = process_group.local_rank(), torch.cuda.device_count()
        if local_rank >= count:
            raise UsageError(
                f"local rank {local_rank} needs a GPU of its own, but torch {torch.__version__} sees {count}: "
                "start fewer ranks, or install a torch build that fits the driver"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # else every rank would also open a context on GPU 0
        return process_group.join("cpu:gloo,cuda:nccl", device, ctx.config.launch.timeout_s)

    @hookimpl
    def distribute(self, ctx: RunContext, model: nn.Module) -> nn.Module:
        from timetrial_nccl import process_group

        if ctx.world_size == 1 and self.config.ddp == "auto":
            return model
        settings = ctx.component("ddp", {"bucket_cap_mb": self.config.bucket_cap_mib})
        return process_group.distribute(model, ctx.device, **settings)

    @hookimpl(wrapper=True)
    def wrap_evaluate(self, ctx: RunContext) -> Generator[None, Evaluate, Evaluate]:
        from timetrial_nccl import process_group

        evaluate = yield
        if ctx.world_size == 1:
            return evaluate

        def evaluate_alike(infer: Forward) -> dict[str, float]:
            process_group.average_buffers(ctx.model)  # every rank must evaluate the same model
            return evaluate(infer)

        return evaluate_alike

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        import torch
        from torch.cuda import nccl
        from torch.distributed.fsdp import FSDPModule
        from torch.nn.parallel import DistributedDataParallel

        wrapped = [m for m in ctx.distributed_model.modules() if isinstance(m, DistributedDataParallel)]
        ddp, cap = bool(wrapped), wrapped[0].bucket_bytes_cap / 2**20 if wrapped else None  # as it is, not as asked for
        version = ".".join(map(str, nccl.version()))
        name = torch.cuda.get_device_name(ctx.device)
        sharded = isinstance(ctx.distributed_model, FSDPModule)
        exchange = "by DistributedDataParallel" if ddp else "by fully_shard" if sharded else ""
        ranks = f"{ctx.world_size} rank{'s' * (ctx.world_size > 1)}"
        return Evidence(
            plugin="nccl",
            active=bool(exchange) or ctx.world_size == 1,
            summary=f"NCCL {version}: {ranks} on {name} joined; "
            f"gradients are {f'averaged {exchange}' if exchange else 'not exchanged'}",
            figures={
                "nccl_version": version,
                "device_name": name,
                "world_size": ctx.world_size,
                "ddp": ddp,
                "bucket_cap_mib": cap,
            },
        )
