"""What torch.compile did since a given moment, from its own counters."""

from __future__ import annotations

from dataclasses import dataclass

from torch._dynamo.utils import counters, get_compilation_metrics

_REASON_LENGTH = 120
"""Characters of a reason that are kept: torch's texts run over many lines."""


@dataclass(frozen=True)
class Counts:
    """Totals of this process; subtract two to get what happened in between."""

    graphs: int
    graph_breaks: dict[str, int]
    """By reason, in torch's words."""

    @staticmethod
    def now() -> Counts:
        return Counts(counters["stats"]["unique_graphs"], dict(counters["graph_break"]))

    def since(self, earlier: Counts) -> Counts:
        breaks = {why: n - earlier.graph_breaks.get(why, 0) for why, n in self.graph_breaks.items()}
        return Counts(self.graphs - earlier.graphs, {_short(why): n for why, n in breaks.items() if n > 0})


def recompilations(since: float) -> list[str]:
    """Why graphs were compiled again after the Unix time `since`; torch remembers its last 64 compilations."""
    metrics = [m for m in get_compilation_metrics() if (m.start_time or 0) >= since]
    return [_short(m.recompile_reason) for m in metrics if m.recompile_reason]


def compile_seconds(since: float) -> float:
    """Seconds spent on compiling forward passes after the Unix time `since`."""
    metrics = [m for m in get_compilation_metrics() if (m.start_time or 0) >= since]
    return sum(m.entire_frame_compile_time_s or 0.0 for m in metrics)


def _short(reason: str) -> str:
    return " ".join(reason.split())[:_REASON_LENGTH]
