"""Likelihood and posteriors of the lattice, against all alignments written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timetrial_lean_transducer.lattice import Cells, all_cells, posteriors

pytestmark = pytest.mark.numbers

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=4)
"""Frames and labels of each utterance."""


def lattice(lengths: list[tuple[int, int]], seed: int = 0) -> tuple[Tensor, Tensor, Cells]:
    """Log-probabilities of blank and label in each cell, in a batch that is padded by one more frame and place."""
    frames_B, labels_B = torch.tensor(lengths).T
    cells = all_cells(int(frames_B.max()) + 1, int(labels_B.max()) + 2, frames_B, labels_B)
    scores_2N = torch.randn(2, len(cells), generator=torch.Generator().manual_seed(seed)) - 1
    return scores_2N[0], scores_2N[1], cells


def alignments(frames: int, labels: int) -> list[list[tuple[int, int, str]]]:
    """Every path, as the arrows it takes: frame, place, and "blank" or "label"."""

    def onward(t: int, u: int) -> list[list[tuple[int, int, str]]]:
        if t == frames:
            return [[]] if u == labels else []
        paths = [[(t, u, "blank"), *rest] for rest in onward(t + 1, u)]
        return paths + ([[(t, u, "label"), *rest] for rest in onward(t, u + 1)] if u < labels else [])

    return onward(0, 0)


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_they_are_those_of_all_alignments_summed(lengths: list[tuple[int, int]]) -> None:
    blank_N, label_N, cells = lattice(lengths)
    likelihood_B, *by = posteriors(blank_N, label_N, cells)
    where = {tuple(c): n for n, c in enumerate(torch.stack(cells.coordinates, 1).tolist())}
    score = {"blank": blank_N.double(), "label": label_N.double()}
    for b, (frames, labels) in enumerate(lengths):
        paths = alignments(frames, labels)
        weights = [math.exp(sum(float(score[kind][where[b, t, u]]) for t, u, kind in path)) for path in paths]
        assert math.isclose(float(likelihood_B[b]), math.log(sum(weights)), rel_tol=1e-9, abs_tol=1e-9)
        for kind, by_N in zip(("blank", "label"), by, strict=True):
            for t in range(frames):
                for u in range(labels + 1):
                    through = sum(w for w, path in zip(weights, paths, strict=True) if (t, u, kind) in path)
                    assert math.isclose(float(by_N[where[b, t, u]]), through / sum(weights), abs_tol=1e-9)


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_every_path_leaves_each_frame_by_one_blank_and_each_place_by_its_label(lengths: list[tuple[int, int]]) -> None:
    _, by_blank_N, by_label_N = posteriors(*(found := lattice(lengths, seed=1)))
    utterance_N, frame_N, place_N = found[2].coordinates
    for b, (frames, labels) in enumerate(lengths):
        for t in range(frames):
            assert math.isclose(by_blank_N[(utterance_N == b) & (frame_N == t)].sum(), 1, rel_tol=1e-9)
        for u in range(labels):
            assert math.isclose(by_label_N[(utterance_N == b) & (place_N == u)].sum(), 1, rel_tol=1e-9)


def test_only_cells_of_the_utterances_are_listed_and_none_twice() -> None:
    cells = all_cells(7, 6, torch.tensor([3, 7, 1]), torch.tensor([5, 2, 0]))
    listed = list(zip(*(c.tolist() for c in cells.coordinates), strict=True))
    expected = [(b, t, u) for b, (T, U) in enumerate([(3, 5), (7, 2), (1, 0)]) for t in range(T) for u in range(U + 1)]
    assert listed == expected


def test_where_no_path_has_a_probability_the_likelihood_is_zero_and_others_are_untouched() -> None:
    blank_N, label_N, cells = lattice([(3, 1), (3, 1)])
    expected_B, by_blank_N, _ = posteriors(blank_N, label_N, cells)
    first_N = cells.coordinates[0] == 0
    impossible_N = blank_N.masked_fill(first_N & (cells.coordinates[1] == 1), -torch.inf)
    likelihood_B, again_N, _ = posteriors(impossible_N, label_N, cells)
    assert likelihood_B[0] == -torch.inf and likelihood_B[1] == expected_B[1]
    assert torch.equal(again_N[~first_N], by_blank_N[~first_N])


def test_one_forbidden_arrow_makes_nothing_infinite() -> None:
    blank_N, label_N, cells = lattice([(3, 2)])
    label_N[0] = -torch.inf  # the first label cannot be said in the first frame
    likelihood_B, by_blank_N, by_label_N = posteriors(blank_N, label_N, cells)
    assert likelihood_B.isfinite().all() and by_blank_N.isfinite().all()
    assert by_label_N[0] == 0 and math.isclose(by_label_N.sum(), 2, rel_tol=1e-9)
