"""What each part of the opt did, in words and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.types import Evidence, Numerics
from timetrial_stream_overlap.feed import Counts
from timetrial_stream_overlap.overlap import Hidden


@dataclass(frozen=True)
class Part:
    """One kind of work: `words` say how it was hidden, or why it was not; `work` is what the trace shows of it."""

    name: str
    words: str
    work: Hidden | None = None


def evidence(parts: Sequence[Part], steps: int, numerics: Numerics | None) -> Evidence:
    """Active if any work at all ran while the model computed, in `steps` profiled steps."""
    figures: dict[str, Any] = {"profiled_steps": steps}
    for part in parts:
        figures[part.name] = {"what": part.words}
        if part.work is not None:
            figures[part.name] |= {
                "ms_per_step": round(part.work.busy / steps / 1000, 4),
                "hidden_share": round(part.work.share, 4),
            }
    return Evidence(
        plugin="stream_overlap",
        active=any(part.work is not None and part.work.hidden > 0 for part in parts),
        summary="; ".join(_sentence(part, steps) for part in parts),
        figures=figures,
        numerics=numerics,
    )


def in_time(counts: Counts) -> str:
    """Of a feed that ran ahead."""
    return f"{counts.ready} of {counts.batches} batches were ready when asked for"


def _sentence(part: Part, steps: int) -> str:
    if part.work is None:
        return f"{part.name}: {part.words}"
    return f"{part.name}: {part.work.share:.0%} of {part.work.busy / steps / 1000:.2f} ms a step hidden ({part.words})"
