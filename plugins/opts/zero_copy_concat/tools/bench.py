"""Query, key and value apart and together: transformers' self-attention, forward and backward, on one CPU thread.

    python plugins/opts/zero_copy_concat/tools/bench.py [ROUNDS]

The two take turns; printed are medians (least to most), and those of the ratio of the two in one round.
"""

from __future__ import annotations

import sys
import time
from functools import partial

import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertSelfAttention

from core.api.statistics import race, ratios, row, spread, table
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


def pass_ms(attention: BertSelfAttention, x: torch.Tensor) -> float:
    start = time.perf_counter()
    attention(x)[0].square().mean().backward()
    elapsed = time.perf_counter() - start
    attention.zero_grad()
    x.grad = None
    return elapsed * 1e3


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    print(table(["size", "apart, ms", "together, ms", "apart / together", "n"]))
    for name, (batch, length, hidden, heads) in CASES.items():
        x = torch.randn(batch, length, hidden, requires_grad=True)
        contenders = {
            "apart": partial(pass_ms, layer(hidden, heads, together=False), x),
            "together": partial(pass_ms, layer(hidden, heads, together=True), x),
        }
        apart, together = race(contenders, rounds, warmup=2).values()
        gains = spread(ratios(apart, together))
        print(row([name, f"{spread(apart):.2f}", f"{spread(together):.2f}", f"{gains:.3f}", rounds]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
