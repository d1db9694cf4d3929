"""The thread that runs ahead of the steps."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from core.api.types import Purpose
from timetrial_stream_overlap.feed import Counts, Feed

CPU = torch.device("cpu")
DEADLINE_S = 20.0
"""For what happens at once; waiting longer means that it does not happen."""


def feed(items: Iterable[Any], depth: int = 2, counts: Counts | None = None) -> Iterator[Any]:
    def plain(batches: Iterable[Any], purpose: Purpose) -> Iterator[Any]:
        assert purpose == "evaluate"
        return iter(batches)

    return Feed(plain, CPU, depth)(items, "evaluate", counts or Counts())


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "stream_overlap"]


def test_items_come_in_order_from_one_other_thread_which_ends_with_them() -> None:
    makers = set[int]()

    def items() -> Iterator[int]:
        for number in range(50):
            makers.add(threading.get_ident())
            yield number

    counts = Counts()
    assert list(feed(items(), counts=counts)) == list(range(50))
    assert len(makers) == 1 and threading.get_ident() not in makers
    assert threads() == []
    assert counts.batches == 50 and 0 <= counts.ready <= 50


@pytest.mark.parametrize("depth", [1, 3])
def test_it_runs_ahead_by_its_depth_and_no_further(depth: int) -> None:
    made, enough = [], threading.Event()

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            if number == depth:
                enough.set()
            yield number

    iterator = feed(items(), depth)
    assert next(iterator) == 0
    assert enough.wait(DEADLINE_S)
    assert made == list(range(depth + 1))
    assert list(iterator) == list(range(1, 10))


def test_an_error_comes_after_the_items_before_it_and_ends_the_thread() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk on fire")

    iterator = feed(items())
    assert next(iterator) == 1
    with pytest.raises(OSError, match="disk on fire"):
        next(iterator)
    assert threads() == []


@pytest.mark.parametrize("stop", ["close", "drop"])
def test_a_consumer_that_stops_early_ends_the_thread_and_the_source(stop: str) -> None:
    ended: list[int] = []

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            ended.append(threading.get_ident())

    iterator = feed(items())
    next(iterator)
    if stop == "close":
        iterator.close()
    else:
        del iterator
        gc.collect()
    assert threads() == []
    assert ended and ended[0] != threading.get_ident()


def test_nothing_starts_before_the_first_item_is_asked_for() -> None:
    iterator = feed(iter(range(3)))
    assert threads() == []
    assert list(iterator) == [0, 1, 2]


def test_the_thread_takes_over_whether_gradients_are_recorded() -> None:
    def items() -> Iterator[bool]:
        yield torch.is_grad_enabled()

    with torch.no_grad():
        assert list(feed(items())) == [False]
    assert list(feed(items())) == [True]


def test_a_source_that_is_fed_itself_starts_no_second_thread() -> None:
    seen: list[int] = []

    def items() -> Iterator[int]:
        for item in feed([1, 2]):
            seen.append(len(threads()))
            yield item

    assert list(feed(items())) == [1, 2]
    assert seen == [1, 1]


def test_two_feeds_at_once_do_not_mix() -> None:
    """As with an evaluation in the middle of an epoch."""
    training = feed(range(10))
    assert next(training) == 0
    assert list(feed(range(100, 105))) == list(range(100, 105))
    assert list(training) == list(range(1, 10))
