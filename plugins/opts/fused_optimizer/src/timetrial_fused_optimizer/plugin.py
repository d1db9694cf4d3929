"""The opt `fused_optimizer`: the workload's optimizer over all parameters at once, without waiting for the device."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from core.api.hooks import hookimpl
from core.api.types import Evidence, OptSpec, Plugin

if TYPE_CHECKING:
    import torch

    from timetrial_fused_optimizer.optimizers import Fused


@dataclass(kw_only=True)
class FusedOptimizerConfig:
    """It has no settings."""


class FusedOptimizer(Plugin):
    """Replaces the workload's SGD, AdamW, LARS or LAMB by a multi-tensor, capturable one over the same groups."""

    spec = OptSpec(
        interface=2,
        summary="multi-tensor, capturable SGD, AdamW, LARS and LAMB",
        numerics="tolerance",
        conflicts={
            "fsdp": "its kernels take whole parameters, not shards of them",
            "tensor_parallel": "its kernels take whole parameters, not parts of them",
        },
    )
    Config = FusedOptimizerConfig
    config: FusedOptimizerConfig

    _optimizer: Fused | None = None

    @hookimpl(wrapper=True)
    def make_optimizer(self) -> Generator[None, torch.optim.Optimizer, torch.optim.Optimizer]:
        from timetrial_fused_optimizer.optimizers import fuse

        self._optimizer = fuse((yield))
        return self._optimizer

    @hookimpl
    def verify(self) -> Evidence:
        seen = self._optimizer.seen if self._optimizer else None
        if self._optimizer is None or seen is None:
            return Evidence(plugin="fused_optimizer", active=False, summary="no update has run yet")
        return Evidence(
            plugin="fused_optimizer",
            active=seen.multi_tensor > 0 and seen.host_reads == 0,
            summary=f"{type(self._optimizer).__name__}: {seen.tensors} parameters in {seen.multi_tensor} multi-tensor "
            f"and {seen.single} other operations a step; values read back by the host: {seen.host_reads}",
            figures={"optimizer": type(self._optimizer).__name__, **asdict(seen)},
        )
