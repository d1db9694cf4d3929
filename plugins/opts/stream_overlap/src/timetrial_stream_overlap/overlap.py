"""How much of one kind of work ran while another did, from the intervals in a profiler's trace.

A trace is what `torch.profiler.profile.export_chrome_trace` writes: complete events ("ph" is "X") with a name, a
category, the thread or stream `tid`, and `ts` and `dur` in microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from timetrial_stream_overlap.feed import PREPARE, WAIT
from timetrial_stream_overlap.updates import UPDATE

Interval = tuple[float, float]
"""Start and end. A list of them is always sorted and disjoint here, except as the argument of `union`."""

_COLLECTIVE = re.compile(r"^(gloo|mpi|ucc):")
"""What torch.distributed calls the record of a collective on the host, from its start to its end."""

_OPERATION = re.compile(r"^(?!c10d::|autograd::|torch::autograd::)\w+::")
"""Work on the host: without collectives, which may wait, and without autograd's frames, which may hold collectives."""

_COMPILED = re.compile(r"^(CompiledFunction|Torch-Compiled Region|## Call CompiledFxGraph)")
"""What torch.compile made shows as one event, without the operations inside."""

_HOST, _DEVICE = "user_annotation", "gpu_user_annotation"
"""Categories of `record_function`: of its block itself, and of the kernels that were launched in it."""


@dataclass(frozen=True)
class Spans:
    """When what ran; `compute` is the model's own work, without what the others are."""

    compute: list[Interval]
    communication: list[Interval]
    preparation: list[Interval]
    """Of batches on the host, by the feed's thread."""
    waiting: list[Interval]
    """The steps' thread for a batch."""
    copies: list[Interval]
    """From the host to the device."""
    updates: list[Interval]
    """In backward passes."""


@dataclass(frozen=True)
class Hidden:
    """Of `busy` microseconds of work, `hidden` ran while the model computed."""

    busy: float
    hidden: float

    @property
    def share(self) -> float:
        return self.hidden / self.busy if self.busy else 0.0


def unnoticed(work: list[Interval], waiting: list[Interval]) -> Hidden:
    """Of work on the host: hidden is what ran while nobody waited for it."""
    return Hidden(length(work), length(difference(work, waiting)))


def hidden(work: list[Interval], compute: list[Interval]) -> Hidden:
    return Hidden(length(work), length(intersection(work, compute)))


def spans(events: Iterable[Mapping[str, Any]], thread: int) -> Spans:
    """Sorts a trace's events. `thread` (its native id) runs the steps.

    With kernels of an accelerator in the trace, time is that of the device's streams. Without, it is the host's:
    operations on `thread`, and collectives on whatever thread completes them.
    """
    complete = [e for e in events if e.get("ph") == "X"]
    return _on_device(complete) if any(e.get("cat") == "kernel" for e in complete) else _on_host(complete, thread)


def _on_device(complete: list[Mapping[str, Any]]) -> Spans:
    updates = _by_thread(_named(complete, UPDATE, _DEVICE))
    compute, communication = list[Interval](), list[Interval]()
    for kernel in (e for e in complete if e.get("cat") == "kernel"):
        one = _interval(kernel)
        if "nccl" in kernel["name"].lower():
            communication.append(one)
        elif not intersection([one], updates.get(kernel["tid"], [])):
            compute.append(one)
    copies = (e for e in complete if e.get("cat") == "gpu_memcpy" and "Memcpy HtoD" in e["name"])
    return Spans(
        compute=union(compute),
        communication=union(communication),
        preparation=union(map(_interval, _named(complete, PREPARE, _HOST))),
        waiting=union(map(_interval, _named(complete, WAIT, _HOST))),
        copies=union(map(_interval, copies)),
        updates=union(interval for work in updates.values() for interval in work),
    )


def _on_host(complete: list[Mapping[str, Any]], thread: int) -> Spans:
    updates = _by_thread(_named(complete, UPDATE, _HOST))
    compute = union(_interval(e) for e in complete if e["tid"] == thread and _computes(e))
    collectives = _by_thread([e for e in complete if _COLLECTIVE.match(e["name"])])
    # An update may run on `thread` itself, or at the end of a collective, before torch.distributed closes its record.
    alone = (difference(work, updates.get(tid, [])) for tid, work in collectives.items())
    return Spans(
        compute=difference(compute, updates.get(thread, [])),
        communication=union(interval for work in alone for interval in work),
        preparation=union(map(_interval, _named(complete, PREPARE, _HOST))),
        waiting=union(map(_interval, _named(complete, WAIT, _HOST))),
        copies=[],
        updates=union(interval for work in updates.values() for interval in work),
    )


def _by_thread(events: list[Mapping[str, Any]]) -> dict[int, list[Interval]]:
    """By thread, or by stream."""
    return {tid: union(_interval(e) for e in events if e["tid"] == tid) for tid in {e["tid"] for e in events}}


def _named(complete: list[Mapping[str, Any]], name: str, category: str) -> list[Mapping[str, Any]]:
    return [e for e in complete if e["name"] == name and e.get("cat") == category]


def _computes(event: Mapping[str, Any]) -> bool:
    operation = event.get("cat") == "cpu_op" and _OPERATION.match(event["name"])
    return bool(operation or _COMPILED.match(event["name"]))


def _interval(event: Mapping[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


# ------------------------------------------------------------------------------------------------- sets of intervals


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """All that is in any of them."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[1] > i[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def intersection(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """All that is in both."""
    common: list[Interval] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def difference(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """All of the first that is not in the second."""
    if not first:
        return []
    edge = [first[0][0], first[-1][1]]
    gaps, at = list[Interval](), edge[0]
    for start, end in second:
        if start > at:
            gaps.append((at, start))
        at = max(at, end)
    gaps.append((at, max(at, edge[1])))
    return intersection(first, gaps)


def length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)
