"""Optimizers and learning-rate schedules of the v1.1 rules for resnet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv:1708.03888) as the MLPerf reference has it
    (mlcommons/training, image_classification/tensorflow2/lars_optimizer.py), the learning rate inside the momentum.

        trust = eeta * |w| / (|g| + weight_decay * |w| + epsilon)      1 where |w| or |g| is 0
        v     = momentum * v + lr * trust * (g + weight_decay * w)
        w     = w - v

    A parameter group with `adapt=False` (biases, batch normalisation) takes trust = 1 and no weight decay. `lr` may be
    a float or a tensor on the parameters' device; nothing waits for the device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        eeta: float = 0.001,
        epsilon: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eeta": eeta, "epsilon": epsilon}
        super().__init__(params, {**defaults, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._update(w, w.grad, group)
        return loss

    def _update(self, w: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if "momentum_buffer" not in self.state[w]:
            self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        v = self.state[w]["momentum_buffer"]
        rate = group["lr"]
        if group["adapt"]:
            w_norm, g_norm = torch.linalg.vector_norm(w), torch.linalg.vector_norm(g)
            decay = group["weight_decay"]
            trust = group["eeta"] * w_norm / (g_norm + decay * w_norm + group["epsilon"])
            rate = rate * torch.where((w_norm > 0) & (g_norm > 0), trust, 1.0)
            g = g + decay * w
        v.mul_(group["momentum"]).add_(g * rate)
        w.sub_(v)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights of convolutions and of the classifier, which decay; biases and batch normalisation, which do
    not (reference: the L2 loss and LARS both skip them). They are told apart by their dimensions."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate by step (counted from 0): a straight line up from 0, then down to the end rate.

    `poly`: end + (base - end) * (1 - t / decay_steps)^power, reference: lars_util.py, PolynomialDecayWithWarmup, where
    also the first step's rate is 0. `cosine`: half a cosine (Loshchilov and Hutter, arXiv:1608.03983).
    """

    family: str
    base: float
    end: float
    warmup_steps: float
    decay_steps: int
    power: float

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.base * step / self.warmup_steps
        done = min((step - self.warmup_steps) / self.decay_steps, 1.0)
        left = (1 - done) ** self.power if self.family == "poly" else (1 + math.cos(math.pi * done)) / 2
        return self.end + (self.base - self.end) * left
