"""Overlap computed from intervals and from made-up traces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timetrial_stream_overlap.overlap import Hidden, difference, hidden, intersection, length, spans, union, unnoticed

pytestmark = pytest.mark.numbers

MAIN, WORKER, STREAM, COPY_STREAM, NCCL_STREAM = 11, 12, 7, 8, 9

some_intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda i: (min(i), max(i))), max_size=8)


def points(intervals: list[tuple[float, float]]) -> set[int]:
    """The unit steps that integer intervals cover."""
    return {n for start, end in intervals for n in range(int(start), int(end))}


@given(some_intervals, some_intervals)
def test_intervals_behave_as_the_sets_that_they_stand_for(first: Any, second: Any) -> None:
    a, b = union(first), union(second)
    assert points(a) == points(first)
    assert points(intersection(a, b)) == points(first) & points(second)
    assert points(difference(a, b)) == points(first) - points(second)
    assert length(a) == len(points(first))


@given(some_intervals, some_intervals)
def test_results_are_sorted_and_disjoint(first: Any, second: Any) -> None:
    for result in (union(first), intersection(union(first), union(second)), difference(union(first), union(second))):
        edges = [edge for interval in result for edge in interval]
        assert edges == sorted(edges)
        assert all(start < end for start, end in result)


def test_the_hidden_share_is_of_the_work_and_not_of_the_compute() -> None:
    assert hidden([(0.0, 10.0)], [(5.0, 100.0)]) == Hidden(busy=10.0, hidden=5.0)
    assert hidden([(0.0, 10.0)], [(5.0, 100.0)]).share == 0.5
    assert hidden([], [(5.0, 100.0)]).share == 0.0


def test_preparation_is_hidden_while_the_steps_do_not_wait_for_it() -> None:
    events = [
        event("stream_overlap.prepare", "user_annotation", WORKER, 0, 40),
        event("stream_overlap.wait", "user_annotation", MAIN, 30, 41),
    ]
    seen = spans(events, MAIN)
    assert unnoticed(seen.preparation, seen.waiting) == Hidden(busy=40, hidden=30)


def event(name: str, category: str, thread: int, start: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "tid": thread, "ts": start, "dur": end - start}


def test_on_a_cpu_operations_of_the_stepping_thread_are_compute_and_collectives_communication() -> None:
    seen = spans(
        [
            event("autograd::engine::evaluate_function: AddmmBackward0", "cpu_op", MAIN, 0, 100),
            event("aten::mm", "cpu_op", MAIN, 0, 40),
            event("aten::mm", "cpu_op", WORKER, 40, 100),
            event("c10d::allreduce_", "cpu_op", MAIN, 40, 50),
            event("gloo:all_reduce", "user_annotation", WORKER, 30, 60),
            event("stream_overlap.prepare", "user_annotation", 13, 10, 20),
            {"ph": "i", "name": "aten::mm", "tid": MAIN, "ts": 70},
        ],
        MAIN,
    )
    assert seen.compute == [(0, 40)]
    assert seen.communication == [(30, 60)]
    assert seen.preparation == [(10, 20)]
    assert hidden(seen.communication, seen.compute).share == pytest.approx(1 / 3)


def test_an_update_at_the_end_of_a_collective_is_not_communication() -> None:
    seen = spans(
        [
            event("gloo:all_reduce", "user_annotation", WORKER, 0, 60),
            event("stream_overlap.update", "user_annotation", WORKER, 40, 60),
            event("gloo:all_reduce", "user_annotation", 14, 55, 70),
            event("aten::mm", "cpu_op", MAIN, 0, 50),
        ],
        MAIN,
    )
    assert seen.communication == [(0, 40), (55, 70)]
    assert hidden(seen.updates, seen.compute).share == 0.5


def test_an_update_in_the_stepping_thread_hides_behind_nothing() -> None:
    update = event("stream_overlap.update", "user_annotation", MAIN, 10, 30)
    seen = spans([event("aten::add_", "cpu_op", MAIN, 12, 28), event("aten::mm", "cpu_op", MAIN, 0, 10), update], MAIN)
    assert seen.compute == [(0, 10)]
    assert hidden(seen.updates, seen.compute).hidden == 0


def test_a_compiled_region_is_compute_as_a_whole() -> None:
    seen = spans([event("CompiledFunctionBackward", "cpu_op", MAIN, 0, 30)], MAIN)
    assert seen.compute == [(0, 30)]


def test_with_kernels_in_the_trace_time_is_that_of_the_device() -> None:
    seen = spans(
        [
            event("aten::mm", "cpu_op", MAIN, 0, 5),
            event("gemm", "kernel", STREAM, 100, 200),
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", "kernel", NCCL_STREAM, 150, 250),
            event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", COPY_STREAM, 120, 140),
            event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", COPY_STREAM, 0, 50),
            event("multi_tensor_apply_kernel", "kernel", COPY_STREAM, 260, 280),
            event("stream_overlap.update", "gpu_user_annotation", COPY_STREAM, 260, 280),
            event("stream_overlap.update", "user_annotation", MAIN, 0, 1),
        ],
        MAIN,
    )
    assert seen.compute == [(100, 200)]
    assert hidden(seen.communication, seen.compute).share == 0.5
    assert hidden(seen.copies, seen.compute).share == 1.0
    assert seen.updates == [(260, 280)]
