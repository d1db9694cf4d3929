"""Fair comparisons of speed: contenders that take turns, and figures as median (least to most). Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

from core.api.errors import TimetrialError

__all__ = ["Spread", "processes", "race", "ratios", "rotated", "row", "spread", "table"]

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """What repeated measurements of the same thing gave, in their unit."""

    median: float
    least: float
    most: float
    n: int
    """Measurements."""

    def __format__(self, form: str) -> str:
        """Median (least to most), each in the format `form`: f"{spread(times):,.0f}" is "700 (661 to 747)"."""
        return f"{self.median:{form}} ({self.least:{form}} to {self.most:{form}})"


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(median(values), min(values), max(values), len(values))


def ratios(values: Iterable[float], others: Iterable[float]) -> list[float]:
    """values / others, round by round: what slows a round down cancels out. ValueError where one has more rounds."""
    return [value / other for value, other in zip(values, others, strict=True)]


def race(
    contenders: Mapping[str, Callable[[], T]], rounds: int, *, warmup: int = 0, title: str | None = None
) -> dict[str, list[T]]:
    """What each contender returned in each round, in which each has one turn.

    A machine that slows down in the meantime slows all of them alike. The first `warmup` rounds come on top, and their
    results are dropped. With a `title`, stderr tells when a round is done.
    """
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name in rotated(list(contenders), number):
            results[name].append(contenders[name]())
        if title is not None:
            print(f"{title}: round {number + 1} of {warmup + rounds} done", file=sys.stderr, flush=True)
    return {name: found[warmup:] for name, found in results.items()}


def rotated(contenders: Sequence[T], number: int) -> list[T]:
    """The contenders in the order of round `number` (from 0), so that each comes first as often as the others."""
    turn = number % len(contenders)
    return [*contenders[turn:], *contenders[:turn]]


@contextmanager
def processes(commands: Mapping[str, Sequence[str]]) -> Generator[dict[str, Callable[[], Any]], None, None]:
    """Contenders for `race` that are separate processes, with one thread each: a call writes a line to the stdin of
    that command, and returns the line of JSON that it prints in answer. They are killed at the end.

    TimetrialError where a process ends instead of answering.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started: dict[str, subprocess.Popen[bytes]] = {}

    def answer(name: str) -> Any:
        process = started[name]
        assert process.stdin and process.stdout
        with suppress(BrokenPipeError):  # the answer will then be missing, too
            process.stdin.write(b"\n")
        line = process.stdout.readline()
        if not line:
            raise TimetrialError(f"{name} ended with status {process.wait()} instead of answering: see its output")
        return json.loads(line)

    try:
        for name, command in commands.items():
            started[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, bufsize=0)
        yield {name: partial(answer, name) for name in commands}
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(columns: Sequence[str], rows: Iterable[Iterable[object]] = ()) -> str:
    """A Markdown table; without `rows` its head, for rows that are printed as they come."""
    return "\n".join([row(columns), "|" + "---|" * len(columns), *map(row, rows)])
