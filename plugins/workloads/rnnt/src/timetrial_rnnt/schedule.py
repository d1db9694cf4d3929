"""The learning-rate schedule of the v1.1 rules for rnnt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate by step (counted from 0), as in the reference (common/optimizers.py, policy "exponential", and
    train.py, which counts steps and epochs from 1).

    A line up to `base` for `warmup_epochs`, `base` for `hold_epochs`, from then on base times `decay` for each epoch
    that has begun; never below `minimum`.
    """

    base: float
    minimum: float
    steps_per_epoch: int
    warmup_epochs: float
    hold_epochs: float
    decay: float

    def __call__(self, step: int) -> float:
        number, epoch = step + 1, step // self.steps_per_epoch + 1
        warmup_steps, hold_steps = (n * self.steps_per_epoch for n in (self.warmup_epochs, self.hold_epochs))
        if number < warmup_steps:
            factor = (number + 1) / (warmup_steps + 1)
        elif number < warmup_steps + hold_steps:
            factor = 1.0
        else:
            factor = self.decay ** max(0.0, epoch - self.warmup_epochs - self.hold_epochs)
        return max(factor * self.base, self.minimum)
