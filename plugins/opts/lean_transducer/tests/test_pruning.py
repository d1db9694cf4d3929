"""The simple joint, the spans that it chooses, and the loss on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchaudio.functional import rnnt_loss

from timetrial_lean_transducer.joint import Settings
from timetrial_lean_transducer.lattice import all_cells
from timetrial_lean_transducer.loss import LeanLoss
from timetrial_lean_transducer.pruning import SimpleJoint, first_places, least_span, prune

pytestmark = pytest.mark.numbers

LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=4)


class Joint(nn.Module):
    def __init__(self, width: int, vocabulary: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dropout, self.output = nn.Dropout(0.0), nn.Linear(width, vocabulary, dtype=dtype)
        self.simple = SimpleJoint(width, vocabulary, seed=0).to(dtype)
        self.blank = vocabulary - 1


def example(lengths: list[tuple[int, int]], dtype: torch.dtype = torch.float32, width: int = 6) -> tuple:
    torch.manual_seed(len(lengths))
    frames, labels = torch.tensor(lengths).T
    encoded = torch.randn(len(lengths), int(frames.max()), width, dtype=dtype, requires_grad=True)
    predicted = torch.randn(len(lengths), int(labels.max()) + 1, width, dtype=dtype, requires_grad=True)
    return (
        Joint(width, 9, dtype),
        encoded,
        predicted,
        torch.randint(8, (len(lengths), int(labels.max()))),
        frames,
        labels,
    )


def simple_loss(made: tuple, span: int = 3) -> Tensor:
    joint, encoded, predicted, labels, frames, label_lengths = made
    cells = all_cells(encoded.shape[1], predicted.shape[1], frames, label_lengths)
    chosen = Settings(
        blank=joint.blank, chunk=16, negligible=0, dropout=0, seed=0, low=encoded.dtype, wide=encoded.dtype,
        recursion="torch",
    )  # fmt: skip
    return prune(joint.simple(encoded, predicted), nn.functional.pad(labels, (0, 1)), cells, span, chosen)[0]


def test_the_simple_loss_is_torchaudios_on_added_logits() -> None:
    made = example([(8, 4), (5, 2), (3, 3)])
    joint, encoded, predicted, labels, frames, label_lengths = made
    wanting = [encoded, predicted, *joint.simple.parameters()]
    by_frame, by_place = joint.simple(encoded, predicted)
    lengths = frames.int(), label_lengths.int()
    expected = rnnt_loss(
        by_frame[:, :, None] + by_place[:, None], labels.int(), *lengths, blank=joint.blank, reduction="none"
    )  # fmt: skip
    losses = simple_loss(made)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    gradients = (torch.autograd.grad(loss.sum(), wanting) for loss in (losses, expected))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_its_normaliser_stays_finite_where_frame_and_place_exclude_each_other() -> None:
    made = example([(4, 2)])
    with torch.no_grad():
        made[1].mul_(1e3)
        made[2].mul_(-1e3)
    losses = simple_loss(made)
    losses.sum().backward()
    assert losses.isfinite().all() and made[1].grad.isfinite().all()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 6), st.integers(0, 1000))
def test_the_spans_leave_a_path_from_the_first_place_to_the_last(
    lengths: list[tuple[int, int]], span: int, seed: int
) -> None:
    frames, labels = torch.tensor(lengths).T
    cells = all_cells(int(frames.max()), int(labels.max()) + 1, frames, labels)
    span = max(span, least_span(cells))
    by_blank, by_label = torch.rand(
        2, len(lengths), cells.frames, cells.places, generator=torch.Generator().manual_seed(seed)
    )
    first_BT = first_places(by_blank, by_label, span, frames, labels)
    for first, (T, U) in zip(first_BT, lengths, strict=True):
        steps = first[:T].diff()
        assert first[0] == 0 and first[T - 1] + span > U
        assert (steps >= 0).all() and (steps < span).all()


def test_the_spans_follow_a_sure_alignment() -> None:
    frames, places, span = 20, 12, 3
    path_T = torch.arange(frames) * (places - 1) // (frames - 1)
    by_blank = torch.nn.functional.one_hot(path_T, places)[None].float()
    by_label = torch.zeros_like(by_blank)
    first_T = first_places(by_blank, by_label, span, torch.tensor([frames]), torch.tensor([places - 1]))[0]
    assert ((first_T <= path_T) & (path_T < first_T + span)).all()


@settings(max_examples=30, deadline=None)
@given(LENGTHS)
def test_with_every_place_in_the_span_it_is_the_exact_loss_and_the_simple_one(lengths: list[tuple[int, int]]) -> None:
    made = example(lengths)
    both = LeanLoss(span=10, simple_scale=0.5)(*made)
    torch.testing.assert_close(both, LeanLoss()(*made) + 0.5 * simple_loss(made))


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(2, 4))
def test_pruned_paths_are_a_finite_part_of_all_paths(lengths: list[tuple[int, int]], span: int) -> None:
    made = example(lengths)
    few = LeanLoss(span=span, simple_scale=0.0)
    losses = few(*made)
    assert losses.isfinite().all() and (losses >= LeanLoss()(*made) - 1e-5).all()
    frames, labels = torch.tensor(lengths).T
    widest = max(span, int((-(-labels // frames)).max()) + 1)
    assert few.work.cells <= int((frames * (labels + 1).clamp_max(widest)).sum())
    assert few.widened == (widest > span)


def test_gradients_of_the_pruned_loss_pass_gradcheck() -> None:
    made = example([(6, 4), (4, 2)], torch.float64)
    loss = LeanLoss(span=2, chunk=8)
    wanting = [made[1], made[2], *made[0].parameters()]
    assert torch.autograd.gradcheck(lambda *_: loss(*made), wanting)
    assert loss.work.cells < loss.work.padded


def test_under_autocast_it_is_float32_and_close() -> None:
    made = example([(9, 4), (6, 2)], width=32)
    expected = LeanLoss(span=3)(*made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = LeanLoss(span=3)(*made)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and made[1].grad.isfinite().all()
    torch.testing.assert_close(losses, expected, rtol=0.05, atol=0)
