"""A step that is recorded once for each shape of its input, and replayed from then on.

Nothing here depends on CUDA: what records is handed in (`Capture`), so that the tests can hand in another one.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from core.api.errors import UsageError
from core.api.tree import map_tensors, tensors

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Records the work of a function without doing it. Returns what does the work, each time anew, and the function's
result, whose tensors hold the outcome of the last time."""

Gather = Callable[[float], list[float]]
"""Every rank's number, in rank order."""

_FIRST_SEEN = 1024
"""Shapes remembered as seen, but not captured. A batch of which each shape is new is never captured."""

_TIMED = 512
"""Latest steps of which the host's time is kept, for the median."""

_SHAPES_OF_AN_EPOCH = 2
"""A full batch and a smaller last one: what ranks with static shapes meet, and meet together."""


@dataclass
class Seen:
    """What happened so far: the evidence."""

    captured: int = 0
    dropped: int = 0
    replays: int = 0
    eager: Counter[str] = field(default_factory=Counter[str])
    """Eager steps by reason."""
    eager_s: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMED))
    """Seconds of the host, a step."""
    replay_s: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMED))

    def figures(self) -> dict[str, Any]:
        return {
            "captured": self.captured,
            "dropped": self.dropped,
            "replays": self.replays,
            "eager": dict(self.eager),
            "host_us_eager": _median_us(self.eager_s),
            "host_us_replay": _median_us(self.replay_s),
        }


def _median_us(seconds: deque[float]) -> float | None:
    return round(statistics.median(seconds) * 1e6, 1) if seconds else None


@dataclass(frozen=True)
class _Graph:
    """One recording: its input buffers, what replays it, and its results."""

    number: int
    inputs: list[Tensor]
    replay: Callable[[], None]
    outputs: Any


def signature(tree: Any) -> tuple[list[Tensor], Hashable]:
    """The tensors of a pytree, and all that a recording takes as fixed: the tree's structure (for a `Batch` with its
    samples and weight), each tensor's shape, dtype and device, and every leaf that is not a tensor."""
    leaves, structure = pytree.tree_flatten(tree)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    fixed = (
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
    )
    return found, (structure, *fixed)


class Graphed:
    """`step(tree)` through recordings, at most `max_graphs` of them; the least recently used one makes room.

    The first `eager_calls` calls are eager, and so is the first call with each signature: whatever is set up lazily for
    it is then set up outside a recording. Results are copies, since the next replay overwrites the originals.

    With `gather`, ranks whose shapes may differ agree before each step, since collectives must be recorded and replayed
    by all ranks together. `static_shapes` says that shapes differ between steps only, not between ranks: then they
    agree once, after the warm-up, that this is so, and a step exchanges nothing.
    """

    def __init__(
        self,
        step: Callable[[Any], Any],
        capture: Capture,
        *,
        eager_calls: int,
        max_graphs: int,
        gather: Gather | None = None,
        static_shapes: bool = True,
        mode: Callable[[], Hashable] = lambda: None,
    ) -> None:
        self.step, self.capture = step, capture
        self.eager_calls, self.max_graphs = eager_calls, max_graphs
        self.gather, self.static_shapes = gather, static_shapes
        self.mode = mode
        """State outside the input that a recording takes as fixed, such as whether the model is in training mode."""
        self.seen = Seen()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._agree_each_step: bool | None = None

    def __call__(self, tree: Any) -> Any:
        start = time.perf_counter()
        inputs, key = signature(tree)
        key = (key, self.mode())
        graph = self._graphs.get(key)
        reason = self._why_eager(key, graph)
        if reason:
            return self._run_eagerly(tree, key, reason)
        if graph is None:
            graph = self._record(tree, key)
            start = time.perf_counter()
        self._graphs.move_to_end(key)
        if inputs:
            torch._foreach_copy_(graph.inputs, inputs)
        graph.replay()
        outputs = map_tensors(Tensor.clone, graph.outputs)
        self.seen.replays += 1
        self.seen.replay_s.append(time.perf_counter() - start)
        return outputs

    def forget(self) -> None:
        """Drops all recordings: addresses that they hold are no longer in use."""
        self.seen.dropped += len(self._graphs)
        self._graphs.clear()

    def _why_eager(self, key: Hashable, graph: _Graph | None) -> str:
        """The reason against a replay of this call, or ""."""
        if self.seen.eager["warm-up"] < self.eager_calls:
            return "warm-up"
        reason = "first of its shape" if graph is None and key not in self._met else ""
        if self.gather is not None and self._ranks_may_differ(self.gather):
            intent = -2.0 if reason else -1.0 if graph is None else float(graph.number)
            if len(set(self.gather(intent))) > 1:
                return reason or "shapes differ between ranks"
        return reason

    def _ranks_may_differ(self, gather: Gather) -> bool:
        if self._agree_each_step is None:
            several = max(gather(float(len(self._met)))) > _SHAPES_OF_AN_EPOCH
            self._agree_each_step = several or not self.static_shapes
        return self._agree_each_step

    def _run_eagerly(self, tree: Any, key: Hashable, reason: str) -> Any:
        self._met[key] = None
        if len(self._met) > _FIRST_SEEN:
            self._met.popitem(last=False)
        self.seen.eager[reason] += 1
        start = time.perf_counter()
        outputs = self.step(tree)
        self.seen.eager_s.append(time.perf_counter() - start)
        return outputs

    def _record(self, tree: Any, key: Hashable) -> _Graph:
        static = map_tensors(Tensor.clone, tree)
        replay, outputs = self.capture(lambda: self.step(static))
        known = (Tensor, int, float, str, type(None))
        opaque = [leaf for leaf in pytree.tree_leaves(outputs) if not isinstance(leaf, known)]
        if opaque:
            raise UsageError(
                f"opt 'cuda_graphs' cannot copy a {type(opaque[0]).__name__} out of a graph: let the step return "
                "tensors in dictionaries, lists and tuples, or leave it out"
            )
        detached = map_tensors(Tensor.detach, outputs)  # lets go of the autograd graph
        graph = self._graphs[key] = _Graph(self.seen.captured, tensors(static), replay, detached)
        self.seen.captured += 1
        # Only now: recording has waited for the device, so that the graph to go is not in use.
        if len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
            self.seen.dropped += 1
        return graph
