"""Cross-entropy over a large vocabulary without all logits in memory.

    loss = sum over n of  log(sum over v of exp(z_nv)) - z_n,label(n)        z = hidden weight^T + bias

Forward and backward pass each go over the positions chunk by chunk. Of a chunk the forward pass keeps one number a
position, the logarithm of the sum; the backward pass computes the chunk's logits again and from them the gradients:

    dz = softmax(z) - onehot(label)      d hidden = dz weight      d weight = dz^T hidden      d bias = sum of dz

Letters: N positions, C positions of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timetrial_bert.seams import IGNORED
from timetrial_fused_loss.memory import PeakMemory


@dataclass
class Observed:
    """Of the first training step. Peaks count what a pass allocated and still held, in bytes."""

    positions: int = 0
    chunks: int = 0
    chunk_positions: int = 0
    chunk_bytes: int = 0
    """The logits of one chunk."""
    logits_bytes: int = 0
    """All logits. The plain loss keeps as much (their log-softmax) for its backward pass, and holds twice as much in
    each of the two passes."""
    gradient_bytes: int = 0
    """What the backward pass must hand on in any case."""
    kept_bytes: int = 0
    """What was held between the two passes."""
    forward_peak: int = 0
    backward_peak: int = 0


class ChunkedLoss:
    """At the seam MLM_LOSS, whose documentation says what it takes and returns.

    Products run in the dtype of autocast where that is on, sums always in float32 (float64 for float64 inputs).
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.seen: Observed | None = None

    @torch.compiler.disable  # its chunks would be unrolled into one graph, and there is nothing to fuse around them
    def __call__(
        self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, labels_N: Tensor, *, count_correct: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The summed loss, a scalar; and with `count_correct` how many largest logits are the label's, int64."""
        device = hidden_NH.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        first, seen = None, self.seen
        if seen is None and torch.is_grad_enabled():
            first = self.seen = _sizes(hidden_NH, weight_VH, self.positions, wide)
        with torch.autocast(device, enabled=False):
            loss, correct = _Loss.apply(  # pyright: ignore[reportGeneralTypeIssues]
                hidden_NH, weight_VH, bias_V, labels_N, self.positions, low, wide, count_correct, first
            )
        return loss, correct if count_correct else None


def _sizes(hidden_NH: Tensor, weight_VH: Tensor, chunk: int, wide: torch.dtype) -> Observed:
    positions, vocabulary = len(hidden_NH), len(weight_VH)
    chunk = min(chunk, positions)
    return Observed(
        positions=positions,
        chunks=-(-positions // chunk) if positions else 0,
        chunk_positions=chunk,
        chunk_bytes=chunk * vocabulary * wide.itemsize,
        logits_bytes=positions * vocabulary * wide.itemsize,
        gradient_bytes=hidden_NH.nbytes + weight_VH.nbytes + vocabulary * weight_VH.itemsize,
    )


class _Loss(torch.autograd.Function):
    """`low` is the dtype of the products, `wide` that of everything else; `seen` takes the peaks of a first step."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, labels_N: Tensor, chunk: int,
        low: torch.dtype, wide: torch.dtype, count_correct: bool, seen: Observed | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with PeakMemory(seen is not None) as memory:
            weight_VH_low, bias_low = weight_VH.to(low), bias_V.to(low)
            used_N = labels_N != IGNORED
            targets_N = labels_N.masked_fill(~used_N, 0)
            log_sums_N = hidden_NH.new_empty(len(hidden_NH), dtype=wide)
            losses_N = torch.empty_like(log_sums_N)
            correct = labels_N.new_zeros(())
            for part in _chunks(len(hidden_NH), chunk):
                logits_CV = torch.addmm(bias_low, hidden_NH[part].to(low), weight_VH_low.t()).to(wide)
                if count_correct:
                    correct += (logits_CV.argmax(1) == labels_N[part]).sum()
                picked_C = logits_CV.gather(1, targets_N[part, None]).squeeze(1)
                largest_C1 = logits_CV.amax(1, keepdim=True)
                log_sums_N[part] = logits_CV.sub_(largest_C1).exp_().sum(1).log_().add_(largest_C1.squeeze(1))
                losses_N[part] = log_sums_N[part] - picked_C
                del logits_CV  # before the next one comes to be
            loss = losses_N.masked_fill_(~used_N, 0).sum()
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, used_N, targets_N, log_sums_N)
        ctx.chunk, ctx.low, ctx.wide, ctx.seen = chunk, low, wide, seen
        ctx.mark_non_differentiable(correct)
        if seen is not None:
            seen.forward_peak, seen.kept_bytes = memory.peak, memory.held
        return loss, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_NH, weight_VH, bias_V, used_N, targets_N, log_sums_N = ctx.saved_tensors
        seen, low, wide = ctx.seen, ctx.low, ctx.wide
        with PeakMemory(seen is not None) as memory:
            weight_VH_low, bias_low = weight_VH.to(low), bias_V.to(low)
            scale_N = grad.to(wide) * used_N
            grad_hidden_NH = torch.empty_like(hidden_NH)
            grad_weight_VH, grad_bias_V = torch.zeros_like(weight_VH), torch.zeros_like(bias_V)
            for part in _chunks(len(hidden_NH), ctx.chunk):
                hidden_CH, targets_C1 = hidden_NH[part].to(low), targets_N[part, None]
                grad_CV = torch.addmm(bias_low, hidden_CH, weight_VH_low.t()).to(wide)
                grad_CV.sub_(log_sums_N[part, None]).exp_()  # softmax
                grad_CV.scatter_(1, targets_C1, grad_CV.gather(1, targets_C1) - 1).mul_(scale_N[part, None])
                grad_bias_V += grad_CV.sum(0)
                grad_CV = grad_CV.to(low)
                grad_hidden_NH[part] = grad_CV @ weight_VH_low
                if low == weight_VH.dtype:
                    grad_weight_VH.addmm_(grad_CV.t(), hidden_CH)
                else:  # chunks are summed in the weight's own precision
                    grad_weight_VH += grad_CV.t() @ hidden_CH
                del grad_CV
        if seen is not None:
            seen.backward_peak, ctx.seen = memory.peak, None
        return grad_hidden_NH, grad_weight_VH, grad_bias_V, *[None] * 6


def _chunks(positions: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, positions)) for start in range(0, positions, chunk)]
