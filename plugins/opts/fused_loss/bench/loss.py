"""Time and memory of the masked-LM loss alone, forward and backward: all logits at once beside chunks of several sizes,
interleaved, on one CPU thread.

    python plugins/opts/fused_loss/bench/loss.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from core.api.statistics import race, spread
from timetrial_bert.model import mlm_loss
from timetrial_fused_loss.loss import ChunkedLoss
from timetrial_fused_loss.memory import PeakMemory

ROUNDS = 7
MIB = 2**20
SHAPES = ((384, 128, 1024), (640, 256, 8000), (608, 1024, 30522))
"""Positions, hidden size, vocabulary: the embedded tier; in between; 8 sequences of BERT-large in phase 2."""
CHUNKS = (64, 256, 1024)


def once(loss: Callable[..., tuple[Tensor, Tensor | None]], inputs: list[Tensor], labels: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    start = time.perf_counter()
    torch.autograd.grad(loss(*inputs, labels, count_correct=False)[0], inputs)
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    for positions, hidden, vocabulary in SHAPES:
        inputs = [torch.randn(positions, hidden), torch.randn(vocabulary, hidden) * 0.02, torch.zeros(vocabulary)]
        inputs = [t.requires_grad_() for t in inputs]
        labels = torch.randint(vocabulary, (positions,))
        contenders = {"plain": mlm_loss, **{f"chunks of {n}": ChunkedLoss(n) for n in CHUNKS if n < positions}}
        passes = {name: partial(once, loss, inputs, labels) for name, loss in contenders.items()}
        seconds = race(passes, ROUNDS, warmup=1)
        print(f"{positions} positions, hidden size {hidden}, vocabulary {vocabulary}, n={ROUNDS}")
        for name, loss in contenders.items():
            with PeakMemory() as memory:
                once(loss, inputs, labels)
            times_ms = spread([s * 1e3 for s in seconds[name]])
            print(f"    {name}: {times_ms:.1f} ms, peak {memory.peak / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
