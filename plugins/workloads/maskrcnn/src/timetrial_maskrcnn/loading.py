"""Examples read by threads, ahead of their use. Threads suffice: Pillow and NumPy let go of the interpreter lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Groups under way while one is in use."""


def read_ahead(
    groups: Iterable[tuple[Key, Sequence[Item]]], read: Callable[[Item], Result], pool: ThreadPoolExecutor | None
) -> Iterator[tuple[Key, list[Result]]]:
    """`read` of each item of each group, in order; in the caller's own thread without a `pool`."""
    if pool is None:
        for key, items in groups:
            yield key, [read(item) for item in items]
        return
    waiting: deque[tuple[Key, list[Future[Result]]]] = deque()
    try:
        for key, items in groups:
            waiting.append((key, [pool.submit(read, item) for item in items]))
            if len(waiting) > AHEAD:
                first, reading = waiting.popleft()
                yield first, [future.result() for future in reading]
        while waiting:
            first, reading = waiting.popleft()
            yield first, [future.result() for future in reading]
    finally:  # the reader may stop at any batch
        for _, reading in waiting:
            for future in reading:
                future.cancel()
