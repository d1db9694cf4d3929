"""Time of one optimizer step alone: each baseline beside its fused counterpart, interleaved, on one CPU thread.

python plugins/opts/fused_optimizer/bench/step_time.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import BertForPreTraining

from core.api.reference import LAMB, LARS, parameter_groups
from core.api.statistics import race, spread, table
from timetrial_bert.model import network_config
from timetrial_fused_optimizer.optimizers import fuse

ROUNDS = 30
Groups = list[dict[str, Any]]
BASELINES: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-6, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-6),
    "LARS": lambda groups: LARS(adapting(groups), lr=1e-6),
    "LAMB": lambda groups: LAMB(adapting(groups), lr=1e-6),
}


def adapting(groups: Groups) -> Groups:
    return [groups[0], {**groups[1], "adapt": False}]


def step_ms(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    torch.set_num_threads(1)
    config = network_config("mini", vocab_size=8000, max_positions=512, dropout=0.0, attention="sdpa", init_std=0.02)
    model = BertForPreTraining(config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    parameters = list(model.parameters())
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} million parameters in {len(parameters)} tensors, n={ROUNDS}")
    rows: list[list[str]] = []
    for name, make in BASELINES.items():
        baseline, fused = make(parameter_groups(model, 0.01)), fuse(make(parameter_groups(model, 0.01)))
        contenders = {"baseline": partial(step_ms, baseline), "fused": partial(step_ms, fused)}
        times = race(contenders, ROUNDS, warmup=1)  # the first step creates state
        rows.append([name, *(f"{spread(ms):.2f}" for ms in times.values())])
    print(table(["optimizer", "baseline, ms", "fused, ms"], rows))


if __name__ == "__main__":
    main()
