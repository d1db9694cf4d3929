"""What each part of the opt did, in words and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.api.types import Evidence, Numerics
from timetrial_stream_overlap.overlap import Hidden


@dataclass(frozen=True)
class Part:
    """One kind of work: `words` say what was done about it, or why nothing was; `work` is what the trace shows."""

    name: str
    words: str
    active: bool = False
    """Whether the opt did something about it."""
    work: Hidden | None = None


def evidence(parts: Sequence[Part], steps: int, problem: str, numerics: Numerics | None) -> Evidence:
    """Of `steps` profiled steps. Where there are none, `problem` says why, and shares of time are missing."""
    figures: dict[str, Any] = {"profiled_steps": steps}
    for part in parts:
        figures[part.name] = {"active": part.active, "what": part.words}
        if part.work is not None and steps:
            figures[part.name] |= {
                "ms_per_step": round(part.work.busy / steps / 1000, 4),
                "hidden_share": round(part.work.share, 4),
            }
    sentences = [_sentence(part, steps) for part in parts]
    return Evidence(
        plugin="stream_overlap",
        active=any(part.active for part in parts),
        summary="; ".join(sentences if steps else [f"no step was profiled ({problem})", *sentences]),
        figures=figures,
        numerics=numerics,
    )


def _sentence(part: Part, steps: int) -> str:
    if part.work is None or not steps:
        return f"{part.name}: {part.words}"
    return f"{part.name}: {part.work.share:.0%} of {part.work.busy / steps / 1000:.2f} ms a step hidden ({part.words})"
