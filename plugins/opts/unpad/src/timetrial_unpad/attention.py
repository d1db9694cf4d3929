"""Attention within each of several concatenated sequences.

T tokens of all sequences, A heads of size D. `cu_seqlens` [sequences + 1] int32, on the tokens' device: where each
begins, and where the last one ends.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor functions without naming them in its types)

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged
from torch.nn import functional as F

HALF = (torch.float16, torch.bfloat16)


def attention(
    q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, cu_seqlens: Tensor, longest: int, dropout: float, scale: float | None
) -> tuple[Tensor, str]:
    """softmax(q k^T scale) v within each sequence, with `dropout` on the softmax; and the name of what computed it."""
    if not q_TAD.is_cpu:
        if q_TAD.dtype in HALF and not dropout:
            from torch.nn.attention.varlen import varlen_attn

            found = varlen_attn(q_TAD, k_TAD, v_TAD, cu_seqlens, cu_seqlens, longest, longest, scale=scale)
            return found, "varlen_attn"  # pyright: ignore[reportReturnType]
        return nested(q_TAD, k_TAD, v_TAD, cu_seqlens, longest, dropout, scale), "nested scaled_dot_product_attention"
    if dropout:
        found = one_by_one(q_TAD, k_TAD, v_TAD, cu_seqlens, dropout, scale)  # pyright: ignore[reportCallIssue]
        return found, "scaled_dot_product_attention by length"
    found = flash(q_TAD, k_TAD, v_TAD, cu_seqlens, scale)  # pyright: ignore[reportCallIssue]
    return found, "flash attention by length"


def nested(
    q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, cu_seqlens: Tensor, longest: int, dropout: float, scale: float | None
) -> Tensor:
    """For devices, where varlen_attn has no kernel for the dtype or no dropout."""
    q, k, v = (
        nested_tensor_from_jagged(t, cu_seqlens, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
        for t in (q_TAD, k_TAD, v_TAD)
    )
    result: Any = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return result.transpose(1, 2).values()


@dataclass(frozen=True)
class Group:
    """A run of equally long sequences."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def grouped(cu_seqlens: Tensor) -> list[Group]:
    """The sequences between these borders, in order; those without a token left out."""
    lengths = (stop - start for start, stop in itertools.pairwise(cu_seqlens.tolist()))
    return [Group(len(list(run)), length) for length, run in itertools.groupby(lengths) if length]


def split(t_TAD: Tensor, groups: list[Group]) -> list[Tensor]:
    """Each group's part as a view [sequences, A, length, D]; with as few views in between as may be, since there is one
    for every length, in every layer."""
    parts = t_TAD.transpose(0, 1)[None].split([group.tokens for group in groups], 2)
    return [
        part if group.sequences == 1 else part[0].unflatten(1, (group.sequences, group.length)).transpose(0, 1)
        for part, group in zip(parts, groups, strict=True)
    ]


@torch.compiler.disable
def one_by_one(
    q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, cu_seqlens: Tensor, dropout: float, scale: float | None
) -> Tensor:
    """Equally long sequences together, in torch's general attention."""
    groups = grouped(cu_seqlens)
    parts = zip(*(split(t, groups) for t in (q_TAD, k_TAD, v_TAD)), strict=True)
    results = [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale) for q, k, v in parts]
    return torch.cat([result.transpose(1, 2).flatten(0, 1) for result in results])


@torch.compiler.disable
def flash(q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, cu_seqlens: Tensor, scale: float | None) -> Tensor:
    """Equally long sequences together, in torch's flash attention for CPUs, without a copy of what goes in."""
    return _Flash.apply(q_TAD, k_TAD, v_TAD, grouped(cu_seqlens), scale)  # pyright: ignore[reportReturnType]


class _Flash(torch.autograd.Function):
    """One node of the autograd graph for all sequences: one for each, and one for each part of what goes in, would take
    longer than the attention of short sequences itself."""

    @staticmethod
    def forward(
        ctx: Any, q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, groups: list[Group], scale: float | None
    ) -> Tensor:
        parts = zip(*(split(t, groups) for t in (q_TAD, k_TAD, v_TAD)), strict=True)
        found = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*part, scale=scale) for part in parts]
        results, log_sums = zip(*found, strict=True)
        result_TAD = torch.empty_like(q_TAD, memory_format=torch.contiguous_format)
        torch._foreach_copy_(split(result_TAD, groups), list(results))
        ctx.save_for_backward(q_TAD, k_TAD, v_TAD, result_TAD, *log_sums)
        ctx.groups, ctx.scale = groups, scale
        return result_TAD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TAD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_TAD, k_TAD, v_TAD, result_TAD, *log_sums = ctx.saved_tensors
        groups: list[Group] = ctx.groups
        parts = zip(*(split(t, groups) for t in (grad_TAD, q_TAD, k_TAD, v_TAD, result_TAD)), log_sums, strict=True)
        found = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*part, 0.0, False, scale=ctx.scale)
            for part in parts
        ]
        grads = [torch.empty_like(q_TAD, memory_format=torch.contiguous_format) for _ in range(3)]
        for grad, of_groups in zip(grads, zip(*found, strict=True), strict=True):
            torch._foreach_copy_(split(grad, groups), list(of_groups))
        return *grads, None, None
