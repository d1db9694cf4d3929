"""The learning-rate schedule of the v1.1 rules for bert."""

from __future__ import annotations

from dataclasses import dataclass

from core.api.reference import polynomial_decay


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate by step (counted from 0), as in the reference (optimization.py, create_optimizer).

    While step - start_warmup_step < warmup_steps: base * (step - start_warmup_step) / warmup_steps. From then on
    base * (1 - step / training_steps)^power, as if there had been no warm-up; 0 from `training_steps` on.
    """

    base: float
    warmup_steps: int
    start_warmup_step: int
    training_steps: int
    power: float

    def __call__(self, step: int) -> float:
        warm = step - self.start_warmup_step
        if warm < self.warmup_steps:
            return self.base * warm / self.warmup_steps
        return polynomial_decay(step, base=self.base, end=0.0, steps=self.training_steps, power=self.power)
