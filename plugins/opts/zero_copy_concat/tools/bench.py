"""Query, key and value apart and together: transformers' self-attention, forward and backward, on one CPU thread.

    python plugins/opts/zero_copy_concat/tools/bench.py [ROUNDS]

The two alternate round by round; printed are medians, and quartiles of the ratio of the two in one round.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertSelfAttention

from timetrial_zero_copy_concat.siblings import find

CASES = {"tiny": (32, 64, 128, 2), "small": (16, 128, 512, 8), "base": (8, 128, 768, 12)}
"""Batch size, sequence length, hidden size, heads."""


def layer(hidden: int, heads: int, together: bool) -> BertSelfAttention:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=hidden, num_attention_heads=heads, attention_probs_dropout_prob=0.0, attn_implementation="sdpa"
    )
    attention = BertSelfAttention(config)
    assert not together or find(attention, [["query", "key", "value"]])
    return attention


def seconds(attention: BertSelfAttention, x: torch.Tensor) -> float:
    start = time.perf_counter()
    attention(x)[0].square().mean().backward()
    elapsed = time.perf_counter() - start
    attention.zero_grad()
    x.grad = None
    return elapsed


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    for name, (batch, length, hidden, heads) in CASES.items():
        x = torch.randn(batch, length, hidden, requires_grad=True)
        pair = [layer(hidden, heads, together) for together in (False, True)]
        times = [[seconds(attention, x) for attention in pair] for _ in range(rounds + 2)][2:]
        apart, together = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
        low, middle, high = statistics.quantiles([a / b for a, b in times], n=4)
        print(
            f"{name:5}  apart {apart:7.2f} ms  together {together:7.2f} ms  "
            f"ratio {middle:.3f} ({low:.3f} to {high:.3f}), n={rounds}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
