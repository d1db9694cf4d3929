"""What can be set under `opt.fsdp` and `opt.tensor_parallel`. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from core.api.config import checked


@dataclass(kw_only=True)
class FsdpConfig:
    """Settings of `opt.fsdp`."""

    reshard_after_forward: bool
    """Free a block's gathered parameters after its forward pass and gather them again for the backward pass; else keep
    them in between, which takes more memory and less communication."""
    shard_size: int | None = checked(at_least=2)
    """Ranks that share one copy of the model; None for all data ranks. With fewer there are several copies, whose
    gradients are averaged."""


@dataclass(kw_only=True)
class TensorParallelConfig:
    """Settings of `opt.tensor_parallel`."""

    degree: int = checked(at_least=2)
    """Ranks that share the layers of one model."""
