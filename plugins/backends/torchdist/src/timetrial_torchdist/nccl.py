"""The NCCL backend: one rank for each NVIDIA GPU, through torch.distributed."""

from __future__ import annotations

from collections.abc import Generator

from core.api.config import RunConfig
from core.api.errors import NotHereError
from core.api.hooks import hookimpl
from core.api.types import Backend, BackendSpec, Evaluate, Evidence, Plugin, RunContext
from timetrial_torchdist.config import NoSettings
from timetrial_torchdist.devices import probe


class Nccl(Plugin):
    """Ranks on NVIDIA GPUs, joined by NCCL; a gloo group beside it carries plain numbers without touching the GPU."""

    spec = BackendSpec(interface=2, summary="one rank for each NVIDIA GPU, joined by NCCL", probe=probe, preference=20)
    Config = NoSettings

    @hookimpl
    def environment(self, config: RunConfig) -> dict[str, str]:
        # cuBLAS needs a fixed workspace to give the same bits (its guide, "Results reproducibility").
        return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if config.deterministic else {}

    @hookimpl
    def init_backend(self, ctx: RunContext) -> Backend:
        import torch

        from timetrial_torchdist import process_group

        local_rank, count = process_group.local_rank(), torch.cuda.device_count()
        if local_rank >= count:
            raise NotHereError(
                f"local rank {local_rank} needs its own GPU, but torch {torch.__version__} sees {count}: "
                "start fewer ranks, or install a torch build that fits the driver"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # else every rank would also open a context on GPU 0
        return process_group.join("cpu:gloo,cuda:nccl", device, ctx.config.launch.timeout_s)

    @hookimpl(wrapper=True)
    def wrap_evaluate(self, ctx: RunContext) -> Generator[None, Evaluate, Evaluate]:
        from timetrial_torchdist.buffers import evaluate_alike

        return evaluate_alike(ctx, (yield))

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        import torch
        from torch.cuda import nccl

        from timetrial_torchdist.process_group import ranks_joined

        ranks, version = ranks_joined(), ".".join(map(str, nccl.version()))
        name = torch.cuda.get_device_name(ctx.device)
        return Evidence(
            plugin="nccl",
            active=ranks == ctx.world_size,
            summary=f"NCCL {version}: {ranks} rank{'s' * (ranks != 1)} on {name} joined",
            figures={"nccl_version": version, "device_name": name, "world_size": ranks},
        )
