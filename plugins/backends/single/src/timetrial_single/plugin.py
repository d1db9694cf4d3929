"""The plainest backend: one process, no process group, on the CPU or on one GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import RunConfig, checked
from core.api.errors import NotHereError
from core.api.hooks import hookimpl
from core.api.types import Backend, BackendSpec, Devices, Evidence, Plugin, RunContext

if TYPE_CHECKING:
    import torch


def probe() -> Devices:
    """One rank's CPU, and "cuda" where the NVIDIA driver lists a GPU that CUDA_VISIBLE_DEVICES does not hide.

    It sees the machine and not the configuration, so "cuda" stands here even if `backend.device=cpu` leaves it unused.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # of an outer launcher, which may start one on each of many nodes
    problem = f"it serves 1 rank, not {ranks}: use backend=auto" if ranks > 1 else ""
    return Devices(provides=frozenset({"cpu", "cuda"} if _sees_gpu() else {"cpu"}), count=1, problem=problem)


def _sees_gpu() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # no driver, or one that does not answer
        return False
    return int(count) > 0


@dataclass(kw_only=True)
class SingleConfig:
    """Settings of `backend=single`."""

    device: str = checked(choices=("auto", "cpu", "cuda"))
    """`auto` takes the GPU if there is one."""


class OneProcess:
    """A `Backend` of one rank, whose collectives have nobody to ask."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def all_gather(self, values: list[float]) -> list[list[float]]:
        return [[float(value) for value in values]]

    def broadcast(self, value: Any) -> Any:
        return value

    def synchronize(self) -> None:
        if self.device.type != "cpu":  # work on the CPU is done when its call returns
            import torch

            torch.accelerator.synchronize(self.device)

    def shutdown(self) -> None:
        """There is nothing to leave."""


class Single(Plugin):
    """One process without torch.distributed."""

    spec = BackendSpec(interface=2, summary="one process without a process group, CPU or one GPU", probe=probe)
    Config = SingleConfig
    config: SingleConfig

    @hookimpl
    def environment(self, config: RunConfig) -> dict[str, str]:
        # cuBLAS needs a fixed workspace to give the same bits (its guide, "Results reproducibility").
        needed = config.deterministic and self.config.device != "cpu"
        return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if needed else {}

    @hookimpl
    def init_backend(self, ctx: RunContext) -> Backend:
        import torch

        usable = torch.cuda.is_available()
        if self.config.device == "cuda" and not usable:
            raise NotHereError(
                f"backend.device=cuda, but torch {torch.__version__} can use no GPU here: use backend.device=cpu"
            )
        if self.config.device == "cpu" or not usable:
            return OneProcess(torch.device("cpu"))
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        return OneProcess(device)

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        weights = {str(p.device) for p in ctx.model.parameters()}
        return Evidence(
            plugin="single",
            active=weights <= {str(ctx.device)},
            summary=f"one process; the model's parameters are on {', '.join(sorted(weights)) or 'no device'}",
            figures={"device": str(ctx.device), "parameter_devices": sorted(weights)},
        )
