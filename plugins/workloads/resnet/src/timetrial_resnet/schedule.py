"""Learning-rate schedules of the v1.1 rules for resnet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.api.reference import polynomial_decay


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
        since, steps = step - self.warmup_steps, self.decay_steps
        if self.family == "poly":
            return polynomial_decay(since, base=self.base, end=self.end, steps=steps, power=self.power)
        half_turn = math.pi * min(since / steps, 1.0)
        return self.end + (self.base - self.end) * (1 + math.cos(half_turn)) / 2
