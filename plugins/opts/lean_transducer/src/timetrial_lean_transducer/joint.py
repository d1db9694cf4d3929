"""The transducer loss of a joint network, without the joint's output for all cells in memory.

    h = dropout(relu(e_t + p_u))      z = weight h + bias      loss = -log(sum over paths of the product of softmax(z))

The forward pass goes over the cells chunk by chunk and keeps two numbers a cell: the log-probabilities of the blank and
of the next label. From them come the posteriors g of the two arrows that leave a cell, and with them

    dz = (g_blank + g_label) softmax(z) - g_blank onehot(blank) - g_label onehot(label)

The backward pass computes h and z again, chunk by chunk, and only where it matters: |dz| sums to at most 2 (g_blank +
g_label), while the posteriors of a frame's cells, and of a place's, sum to 1 or more, since every path crosses them. So
a cell whose posterior is below `negligible` is left out: what float32 would round away is not worth computing.

Letters: N cells, K cells that the backward pass needs, C cells of a chunk, J width of the joint, V vocabulary,
B utterances, T frames, U labels, W = U + 1 places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timetrial_lean_transducer.lattice import Cells, posteriors
from timetrial_lean_transducer.memory import PeakMemory


class Inputs(NamedTuple):
    encoded_BTJ: Tensor
    predicted_BWJ: Tensor
    weight_VJ: Tensor
    bias_V: Tensor
    targets_BW: Tensor
    """The next label of each place, int64; any label at an utterance's last place."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    blank: int
    chunk: int
    """Cells whose logits exist at a time."""
    negligible: float
    dropout: float
    seed: int
    """Of the dropout masks, which the backward pass draws again."""
    low: torch.dtype
    """Of the matrix products: autocast's, or the inputs' own."""
    wide: torch.dtype
    """Of everything else."""
    recursion: str
    """"torch" or "triton": which implementation goes through the lattice."""


@dataclass
class Work:
    """What all calls for training came to. Bytes are those of the first one."""

    calls: int = 0
    padded: int = 0
    """Cells of the (B, T, W) tensors, padding and all."""
    cells: int = 0
    """Cells whose logits the forward pass computed."""
    revisited: int = 0
    """Cells whose logits the backward pass computed again."""
    left_out: Tensor | float = 0.0
    """Of the last call, and its worst utterance: the sum of the posteriors of the others, of frames + labels in all."""
    kept_bytes: int = 0
    """Held between the two passes."""
    peak_bytes: int = 0
    """The most held at a time, gradients included."""


def joint_loss(
    inputs: Inputs, cells: Cells, settings: Settings, work: Work, memory: PeakMemory | None = None
) -> Tensor:
    """Losses (B,) in nats, in `settings.wide`. `memory`, where it is given, is to watch the backward pass too."""
    return _JointLoss.apply(*inputs, cells, settings, work, memory)  # pyright: ignore[reportReturnType, reportCallIssue]


class _JointLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, encoded_BTJ: Tensor, predicted_BWJ: Tensor, weight_VJ: Tensor, bias_V: Tensor, targets_BW: Tensor,
        cells: Cells, settings: Settings, work: Work, memory: PeakMemory | None,
    ) -> Tensor:  # fmt: skip
        inputs = Inputs(encoded_BTJ, predicted_BWJ, weight_VJ, bias_V, targets_BW)
        likelihood_B, by_blank_N, by_label_N = posteriors(*_scores(inputs, cells, settings), cells, settings.recursion)
        passing_N = by_blank_N + by_label_N
        needed_K = (~(passing_N < settings.negligible)).nonzero().squeeze(1)  # NaN too, which must not go unseen
        leaving_2K = torch.stack([by_blank_N[needed_K], by_label_N[needed_K]]).to(settings.wide)
        ctx.save_for_backward(*inputs, needed_K, leaving_2K)
        ctx.cells, ctx.settings, ctx.work, ctx.memory = cells, settings, work, memory
        work.calls += 1
        work.padded += len(likelihood_B) * cells.frames * cells.places
        work.cells += len(cells)
        passing_N[needed_K] = 0
        utterance_N, *_ = cells.coordinates
        work.left_out = torch.zeros_like(likelihood_B).index_add_(0, utterance_N, passing_N).max()
        return -likelihood_B.to(settings.wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, needed_K, leaving_2K = ctx.saved_tensors
        cells, work, memory = ctx.cells, ctx.work, ctx.memory
        work.revisited += len(needed_K)
        work.kept_bytes = memory.held if memory else work.kept_bytes
        with memory or nullcontext():
            utterance_K = cells.number_N[needed_K] // (cells.frames * cells.places)
            leaving_2K = leaving_2K * grad_B.to(leaving_2K.dtype)[utterance_K]
            gradients = _gradients(Inputs(*inputs), cells, ctx.settings, needed_K, leaving_2K)
        work.peak_bytes = memory.peak if memory else work.peak_bytes
        return *gradients, *[None] * 5


def _scores(inputs: Inputs, cells: Cells, settings: Settings) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) of each cell's blank and label."""
    joint = _Joint(inputs, settings, len(cells))
    everything_N = torch.arange(len(cells), device=cells.number_N.device)
    blank_N = inputs.encoded_BTJ.new_empty(len(cells), dtype=settings.wide)
    label_N = torch.empty_like(blank_N)
    for part_C, mask_CJ in joint.chunks(everything_N):
        chunk = joint.forward(cells.number_N.index_select(0, part_C), mask_CJ)
        scores_CV = torch.log_softmax(chunk.logits_CV, 1, dtype=settings.wide, out=chunk.spare_CV)
        blank_N[part_C] = scores_CV[:, settings.blank]
        label_N[part_C] = scores_CV.gather(1, chunk.target_C1).squeeze(1)
    return blank_N, label_N


def _gradients(
    inputs: Inputs, cells: Cells, settings: Settings, needed_K: Tensor, leaving_2K: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of encoded, predicted, weight and bias; `leaving_2K` weighs each needed cell's blank and label."""
    encoded_BTJ, predicted_BWJ, weight_VJ, bias_V, _ = inputs
    joint = _Joint(inputs, settings, len(cells))
    grad_encoded_RJ, grad_predicted_RJ = (torch.zeros_like(t, dtype=settings.wide) for t in joint.rows)
    grad_weight_VJ, grad_bias_V = torch.zeros_like(weight_VJ), torch.zeros_like(bias_V)
    done = 0
    for part_C, mask_CJ in joint.chunks(needed_K):
        blank_C1, label_C1 = leaving_2K[:, done : (done := done + len(part_C)), None]
        chunk = joint.forward(cells.number_N.index_select(0, part_C), mask_CJ)
        grad_CV = torch.softmax(chunk.logits_CV, 1, dtype=settings.wide, out=chunk.spare_CV)
        grad_CV *= blank_C1 + label_C1
        grad_CV[:, settings.blank, None] -= blank_C1
        grad_CV.scatter_add_(1, chunk.target_C1, -label_C1)
        grad_bias_V += grad_CV.sum(0)
        grad_CV = grad_CV.to(settings.low)
        if settings.low == weight_VJ.dtype:
            grad_weight_VJ.addmm_(grad_CV.t(), chunk.hidden_CJ)
        else:  # chunks are summed in the weight's own precision
            grad_weight_VJ += grad_CV.t() @ chunk.hidden_CJ
        grad_CJ = torch.mm(grad_CV, joint.weight_VJ, out=chunk.spare_CJ.to(settings.low))
        # Where h is zero, the ReLU or the dropout has stopped it; elsewhere the dropout has scaled it.
        torch.ops.aten.threshold_backward.grad_input(grad_CJ, chunk.hidden_CJ, 0, grad_input=grad_CJ)
        grad_CJ = grad_CJ.to(settings.wide).mul_(joint.scale)
        grad_encoded_RJ.index_add_(0, chunk.frame_C, grad_CJ)
        grad_predicted_RJ.index_add_(0, chunk.place_C, grad_CJ)
    grad_encoded_BTJ = grad_encoded_RJ.view_as(encoded_BTJ).to(encoded_BTJ.dtype)
    return (
        grad_encoded_BTJ,
        grad_predicted_RJ.view_as(predicted_BWJ).to(predicted_BWJ.dtype),
        grad_weight_VJ,
        grad_bias_V,
    )


@dataclass(frozen=True)
class _Chunk:
    frame_C: Tensor
    """Rows of `encoded` over all utterances, one for each cell."""
    place_C: Tensor
    """Rows of `predicted`."""
    target_C1: Tensor
    hidden_CJ: Tensor
    """This and what follows live until the next chunk."""
    logits_CV: Tensor
    spare_CJ: Tensor
    """Room for what has the shape of the hidden values."""
    spare_CV: Tensor
    """Room for what has the shape of the logits."""


class _Joint:
    """The joint network on chunks of cells. What has a chunk's size and the vocabulary's is allocated once: a CPU takes
    three times as long to fill fresh memory as for the softmax itself."""

    def __init__(self, inputs: Inputs, settings: Settings, cells: int) -> None:
        encoded_BTJ, predicted_BWJ, weight_VJ, bias_V, targets_BW = inputs
        self.settings, self.cells = settings, cells
        self.frames, self.places = encoded_BTJ.shape[1], predicted_BWJ.shape[1]
        common = torch.promote_types(encoded_BTJ.dtype, predicted_BWJ.dtype)
        self.rows = encoded_BTJ.flatten(0, 1).to(common), predicted_BWJ.flatten(0, 1).to(common)
        self.weight_VJ, self.bias_V = weight_VJ.to(settings.low), bias_V.to(settings.low)
        self.target_R1 = targets_BW.reshape(-1, 1)
        self.scale = 1 / (1 - settings.dropout) if settings.dropout < 1 else 0.0
        chunk = min(settings.chunk, cells)
        hidden_CJ = self.rows[0].new_empty(chunk, weight_VJ.shape[1])
        logits_CV = self.weight_VJ.new_empty(chunk, len(weight_VJ))
        spare_CV = torch.empty_like(logits_CV, dtype=settings.wide)
        self.buffers = hidden_CJ, torch.empty_like(hidden_CJ), logits_CV, spare_CV

    def chunks(self, wanted_K: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """`wanted_K`, ascending places in the list of cells, in chunks, with the dropout mask of each.

        A mask is drawn for all cells of a chunk, in the same order in both passes, whichever of them are wanted.
        """
        size, cells, device = self.settings.chunk, self.cells, wanted_K.device
        if not self.settings.dropout:
            yield from ((part_C, None) for part_C in wanted_K.split(size))
            return
        generator = torch.Generator(device).manual_seed(self.settings.seed)
        starts = range(0, cells, size)
        borders = torch.searchsorted(wanted_K, torch.tensor([*starts, cells], device=device)).tolist()
        for start, (first, end) in zip(starts, pairwise(borders), strict=True):
            mask_CJ = self.rows[0].new_empty(min(size, cells - start), self.rows[0].shape[1])
            mask_CJ.bernoulli_(1 - self.settings.dropout, generator=generator).mul_(self.scale)
            part_C = wanted_K[first:end]
            yield part_C, mask_CJ.index_select(0, part_C - start)

    def forward(self, number_C: Tensor, mask_CJ: Tensor | None) -> _Chunk:
        """The joint's output in the cells with these numbers."""
        encoded_RJ, predicted_RJ = self.rows
        frame_C = number_C // self.places
        place_C = frame_C // self.frames * self.places + number_C % self.places
        hidden_CJ, spare_CJ, logits_CV, spare_CV = (t[: len(number_C)] for t in self.buffers)
        # index_select: on a CPU six times as fast as indexing.
        torch.index_select(encoded_RJ, 0, frame_C, out=hidden_CJ)
        hidden_CJ.add_(torch.index_select(predicted_RJ, 0, place_C, out=spare_CJ)).relu_()
        if mask_CJ is not None:
            hidden_CJ *= mask_CJ
        hidden_CJ = hidden_CJ.to(self.settings.low)
        torch.addmm(self.bias_V, hidden_CJ, self.weight_VJ.t(), out=logits_CV)
        target_C1 = self.target_R1.index_select(0, place_C)
        return _Chunk(frame_C, place_C, target_C1, hidden_CJ, logits_CV, spare_CJ, spare_CV)
