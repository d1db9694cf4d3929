"""Which few places of each frame are worth the joint network: "Pruned RNN-T for fast, memory-efficient ASR training",
Kuang et al., arXiv:2206.13236.

A simple joint, whose logits are a sum of one vector a frame and one a place, needs no vector a cell: the normaliser of
its softmax is a matrix product of exponentials,

    log(sum over v of exp(a_tv + c_uv)) = log((exp(a) exp(c)^T)_tu).

Its posteriors choose `span` neighbouring places of each frame, and the joint network is computed in these only. The two
projections that the simple joint consists of are trained by its own loss, which is added to the other.

Letters: as in joint.py; S places of a span, P places where a span can begin.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timetrial_lean_transducer.joint import Settings
from timetrial_lean_transducer.lattice import Cells, posteriors


class SimpleJoint(nn.Module):
    """Encoded frames (B, T, J) and predicted places (B, W, J) to the logits (B, T, V) and (B, W, V) that are added."""

    def __init__(self, width: int, vocabulary: int, seed: int) -> None:
        super().__init__()
        self.by_frame, self.by_place = nn.Linear(width, vocabulary, bias=False), nn.Linear(width, vocabulary)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():  # torch's usual distribution
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)

    def forward(self, encoded_BTJ: Tensor, predicted_BWJ: Tensor) -> tuple[Tensor, Tensor]:
        return self.by_frame(encoded_BTJ), self.by_place(predicted_BWJ)


def prune(
    simple: tuple[Tensor, Tensor], targets_BW: Tensor, cells: Cells, span: int, settings: Settings
) -> tuple[Tensor, Cells]:
    """The simple joint's loss (B,) in nats, given what it has computed, and the `cells` that it leaves."""
    by_frame_BTV, by_place_BWV = (logits.to(settings.wide) for logits in simple)
    scores = simple_scores(by_frame_BTV, by_place_BWV, targets_BW, settings.blank)
    packed = (t.flatten().index_select(0, cells.number_N) for t in scores)
    simple_B, *found = PathLoss.apply(*packed, cells, settings.recursion)  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType]
    by_blank_BTW, by_label_BTW = (
        torch.zeros_like(t_BTW).flatten().index_copy_(0, cells.number_N, t_N).view_as(t_BTW)
        for t_BTW, t_N in zip(scores, found, strict=True)
    )
    first_BT = first_places(by_blank_BTW, by_label_BTW, span, cells.frames_B, cells.labels_B)
    return simple_B, pruned(cells, first_BT, span)


def simple_scores(by_frame_BTV: Tensor, by_place_BWV: Tensor, targets_BW: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T, W) of blank and next label, where logits are a sum."""
    largest_BT1 = by_frame_BTV.detach().amax(2, keepdim=True)
    largest_BW1 = by_place_BWV.detach().amax(2, keepdim=True)
    sums_BTW = (by_frame_BTV - largest_BT1).exp() @ (by_place_BWV - largest_BW1).exp().mT
    # Where each favours what the other excludes, the product underflows; its logarithm must stay finite.
    norm_BTW = sums_BTW.clamp_min(torch.finfo(sums_BTW.dtype).tiny).log() + largest_BT1 + largest_BW1.mT
    blank_BTW = by_frame_BTV[:, :, blank, None] + by_place_BWV[:, None, :, blank] - norm_BTW
    index_BTW = targets_BW[:, None].expand_as(norm_BTW)
    label_BTW = by_frame_BTV.gather(2, index_BTW) + by_place_BWV.gather(2, targets_BW[:, :, None]).mT - norm_BTW
    return blank_BTW, label_BTW


class PathLoss(torch.autograd.Function):
    """`apply(blank_N, label_N, cells, recursion)`: losses (B,) in nats, and the posteriors, without gradient."""

    @staticmethod
    def forward(
        ctx: Any, blank_N: Tensor, label_N: Tensor, cells: Cells, recursion: str
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        likelihood_B, *found = posteriors(blank_N, label_N, cells, recursion)
        by_blank_N, by_label_N = (t.to(blank_N.dtype) for t in found)
        ctx.save_for_backward(by_blank_N, by_label_N)
        ctx.cells = cells
        ctx.mark_non_differentiable(by_blank_N, by_label_N)
        return -likelihood_B.to(blank_N.dtype), by_blank_N, by_label_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_B: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_blank_N, by_label_N = ctx.saved_tensors
        scale_N = -grad_B[ctx.cells.coordinates[0]]
        return by_blank_N * scale_N, by_label_N * scale_N, None, None


def least_span(cells: Cells) -> int:
    """The fewest places a frame that leave every utterance a path: `span - 1` labels can be said in each frame."""
    return int(((cells.labels_B + cells.frames_B - 1) // cells.frames_B).max()) + 1


def first_places(by_blank_BTW: Tensor, by_label_BTW: Tensor, span: int, frames_B: Tensor, labels_B: Tensor) -> Tensor:
    """Where each frame's span begins, int64 (B, T).

    A span is worth the posterior of the paths that leave its frame from inside it, less those that enter it from below.
    Where the best spans leave no path (which begins at place 0, ends at the last, never goes back, and needs a place
    that this frame's span and the next one's share), they are moved.
    """
    *_, frames, places = by_blank_BTW.shape
    if span >= places:
        return labels_B.new_zeros(len(labels_B), frames)
    inside_BTP = by_blank_BTW.unfold(2, span, 1).sum(3)
    entering_BTP = F.pad(by_label_BTW, (1, 0))[:, :, : places - span + 1]
    last_B1 = (labels_B + 1 - span).clamp_min(0)[:, None]
    beyond_BP = torch.arange(places - span + 1, device=labels_B.device) > last_B1
    best_BT = (inside_BTP - entering_BTP).masked_fill(beyond_BP[:, None], -torch.inf).argmax(2)

    climb_T = torch.arange(frames, device=labels_B.device) * (span - 1)  # as high as a span can begin in each frame
    left_BT = ((frames_B[:, None] - 1) * (span - 1) - climb_T).clamp_min(0)
    first_BT = torch.maximum(torch.minimum(best_BT, climb_T), last_B1 - left_BT).cummax(1).values
    # Where a later span is out of reach, begin higher before it.
    reach_BT = (first_BT - climb_T).flip(1).cummax(1).values.flip(1)
    return torch.maximum(first_BT, reach_BT + climb_T)


def pruned(cells: Cells, first_BT: Tensor, span: int) -> Cells:
    """The cells of the spans."""
    place_BTS = first_BT[:, :, None] + torch.arange(span, device=first_BT.device)
    frame_T = torch.arange(cells.frames, device=first_BT.device)
    row_BT = torch.arange(len(first_BT), device=first_BT.device)[:, None] * cells.frames + frame_T
    used_BTS = (place_BTS <= cells.labels_B[:, None, None]) & (frame_T < cells.frames_B[:, None])[:, :, None]
    return replace(cells, number_N=(row_BT[:, :, None] * cells.places + place_BTS)[used_BTS])
