"""The opt `activation_checkpointing`: less memory for activations, paid for with a second forward pass."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.api.config import checked
from core.api.errors import NotOfferedError
from core.api.hooks import hookimpl
from core.api.types import Evidence, OptSpec, Plugin, RunContext

if TYPE_CHECKING:
    from torch import nn

    from timetrial_activation_checkpointing.blocks import CheckpointedBlock


@dataclass(kw_only=True)
class ActivationCheckpointingConfig:
    """Settings of `opt.activation_checkpointing`."""

    every: int = checked(at_least=1)
    """Checkpoint the first of every N blocks; 1 is all of them."""


class ActivationCheckpointing(Plugin):
    """Keeps the inputs of the workload's blocks and recomputes their activations in the backward pass."""

    spec = OptSpec(
        interface=2,
        summary="activations inside the model's blocks are recomputed in the backward pass, not kept",
        numerics="bitwise",
        conflicts={
            "cuda_graphs": "each block keeps the random generator's state for its recomputation, and reading that "
            "state is forbidden while a graph is captured"
        },
    )
    Config = ActivationCheckpointingConfig
    config: ActivationCheckpointingConfig

    _blocks: list[CheckpointedBlock] | None = None
    _all = 0

    @hookimpl(wrapper=True)
    def prepare_model(self, ctx: RunContext) -> Generator[None, nn.Module, nn.Module]:
        from timetrial_activation_checkpointing.blocks import CheckpointedBlock

        model = yield
        blocks = ctx.workload.blocks(ctx.model)
        if not blocks:
            raise NotOfferedError(
                "opt 'activation_checkpointing' acts on the repeated blocks of a model, but this workload names none; "
                "leave it out"
            )
        self._blocks = [CheckpointedBlock(block, ctx.device) for block in blocks[:: self.config.every]]
        self._all = len(blocks)
        return model

    @hookimpl
    def verify(self) -> Evidence:
        name, blocks = "activation_checkpointing", self._blocks or []
        recomputed, compiled = sum(b.recomputed > 0 for b in blocks), sum(b.compiled for b in blocks)
        if recomputed + compiled == 0:
            return Evidence(plugin=name, active=False, summary="no block has been recomputed yet")
        figures = {"blocks": self._all, "checkpointed": len(blocks), "compiled": compiled}
        parts: list[str] = []
        if recomputed:
            whole, kept = sum(b.saved_whole for b in blocks), sum(b.saved for b in blocks)
            times = sum(b.recomputed for b in blocks)
            parts.append(f"{recomputed} of {self._all} blocks recomputed, {times} times in all")
            parts.append(f"they kept {kept:,} bytes for the backward pass instead of {whole:,}")
            figures |= {"recomputations": times, "saved_bytes": kept, "saved_bytes_without": whole}
        if compiled:
            parts.append(f"{compiled} of {self._all} blocks compiled with the mark to recompute them")
        return Evidence(plugin=name, active=True, summary="; ".join(parts), figures=figures)
