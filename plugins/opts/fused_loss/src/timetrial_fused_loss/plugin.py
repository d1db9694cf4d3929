"""The opt `fused_loss`: vocabulary projection and cross-entropy in one, a chunk of positions at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.seams import Replacement
from core.api.types import Evidence, OptSpec, Plugin
from timetrial_bert.seams import MLM_LOSS

if TYPE_CHECKING:
    from timetrial_fused_loss.loss import ChunkedLoss

MIB = 2**20


@dataclass(kw_only=True)
class FusedLossConfig:
    """Settings of `opt.fused_loss`."""

    positions: int = checked(at_least=1)
    """Positions of a chunk, whose logits exist at the same time."""


class FusedLoss(Plugin):
    """Replaces the masked-LM loss by one that never holds all logits."""

    spec = OptSpec(
        interface=2,
        summary="masked-LM cross-entropy in chunks, recomputed in the backward pass",
        numerics="tolerance",
        replaces=frozenset({MLM_LOSS}),
    )
    Config = FusedLossConfig
    config: FusedLossConfig

    _loss: ChunkedLoss | None = None

    @hookimpl
    def replace(self) -> list[Replacement[Any]]:
        return [MLM_LOSS.by(self._make_loss)]

    def _make_loss(self, inner: Any) -> ChunkedLoss:
        from timetrial_fused_loss.loss import ChunkedLoss

        self._loss = ChunkedLoss(self.config.positions)
        return self._loss

    @hookimpl
    def verify(self) -> Evidence:
        seen = self._loss.seen if self._loss else None
        if seen is None or not seen.backward_peak:
            return Evidence(plugin="fused_loss", active=False, summary="no training step has run yet")
        peak, chunks = max(seen.forward_peak, seen.backward_peak), seen.chunks
        return Evidence(
            plugin="fused_loss",
            active=seen.kept_bytes < seen.logits_bytes,
            summary=f"{chunks} chunk{'s' * (chunks != 1)} of at most {seen.chunk_positions} positions: "
            f"{seen.chunk_bytes / MIB:.2f} MiB of logits at a time, not {seen.logits_bytes / MIB:.2f}; kept for the "
            f"backward pass {seen.kept_bytes / MIB:.2f} MiB; peak {peak / MIB:.2f} MiB, of which gradients "
            f"{seen.gradient_bytes / MIB:.2f}",
            figures=asdict(seen),
        )
