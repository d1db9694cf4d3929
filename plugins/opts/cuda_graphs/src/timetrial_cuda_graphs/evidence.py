"""What was captured and replayed, in figures and in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from core.api.types import Evidence
from timetrial_cuda_graphs.graphed import Seen
from timetrial_cuda_graphs.parts import Part, Signature

_EAGER_SHAPES = 16
"""The most frequent ones are listed; there may be any number."""


def of_steps(seen: Mapping[str, Seen], rounds_otherwise: bool) -> Evidence:
    """Of whole steps, by purpose. Active once a training step was replayed.

    `rounds_otherwise` says that the optimizer's kernel is another than without graphs; else the same kernels run.
    """
    train = seen.get("train", Seen())
    words = [f"{purpose}: {_words(one)}" for purpose, one in seen.items() if one.replays or one.eager]
    return Evidence(
        plugin="cuda_graphs",
        active=train.replays > 0,
        summary="; ".join(words) or "no step has run yet",
        figures={purpose: one.figures() for purpose, one in seen.items()},
        numerics=None if rounds_otherwise else "bitwise",
    )


def of_parts(parts: Mapping[str, Part]) -> Evidence:
    """Of parts of the model. Active once one was replayed."""
    replays = sum(part.replays.total() for part in parts.values())
    eager = sum(part.eager_calls.total() for part in parts.values())
    graphs = [f"{name}, {len(part.graphs)} shapes" for name, part in parts.items()]
    return Evidence(
        plugin="cuda_graphs",
        active=replays > 0,
        summary=f"parts of the model captured ({'; '.join(graphs)}): {replays} replays, {eager} eager calls of "
        "other shapes",
        figures={
            name: {
                "replays": dict(_by_shapes(part.replays)),
                "eager_calls": dict(_by_shapes(part.eager_calls).most_common(_EAGER_SHAPES)),
            }
            for name, part in parts.items()
        },
        numerics="bitwise",
    )


def _by_shapes(counts: Counter[Signature]) -> Counter[str]:
    """By the shapes of a part's arguments, such as "32x56x240"."""
    named = Counter[str]()
    for signature, count in counts.items():
        named[", ".join("x".join(map(str, shape)) for shape, *_ in signature)] += count
    return named


def _words(seen: Seen) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(seen.eager.items()))
    text = f"{seen.captured} graphs captured, {seen.replays} replays, {seen.eager.total()} eager steps ({reasons})"
    text += f", {seen.dropped} graphs dropped" if seen.dropped else ""
    figures = seen.figures()
    if seen.replays and seen.eager:
        text += (
            f", host {figures['host_us_eager']:.0f} us an eager step and {figures['host_us_replay']:.0f} us a replay"
        )
    return text
