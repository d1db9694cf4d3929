"""Time and memory of the masked-LM loss alone, forward and backward: all logits at once beside chunks of several sizes,
interleaved, on one CPU thread.

    python plugins/opts/fused_loss/bench/loss.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

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
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS + 1):
            for name, loss in contenders.items():
                seconds[name].append(once(loss, inputs, labels))
        print(f"{positions} positions, hidden size {hidden}, vocabulary {vocabulary}, n={ROUNDS}")
        for name, loss in contenders.items():
            with PeakMemory() as memory:
                once(loss, inputs, labels)
            times = [s * 1e3 for s in seconds[name][1:]]  # the first one also counts memory
            spread = f"{statistics.median(times):.1f} ms ({min(times):.1f} to {max(times):.1f})"
            print(f"    {name}: {spread}, peak {memory.peak / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
