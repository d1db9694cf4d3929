"""LAMB and the learning-rate schedule of the v1.1 rules for rnnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive moments (You et al. 2019, arXiv:1904.00962, algorithm 2), with the gradients clipped first.

        g = g * min(1, max_grad_norm / |all gradients|)               where max_grad_norm is given
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g^2
        u = m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + eps) + weight_decay * w
        w = w - lr * |w| / |u| * u                                     the ratio is 1 where either norm is 0

    As in the reference's FusedLAMB, every tensor decays and adapts, biases too. State: `step` (a float32 scalar on the
    device), `exp_avg` and `exp_avg_sq`. Nothing waits for the device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float | None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            # How other implementations of LAMB name what this one always does.
            "bias_correction": True,
            "adapt": True,
            "capturable": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [w for w in group["params"] if w.grad is not None]
            clip: Tensor | float = 1.0
            if group["max_grad_norm"] and params:
                norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(w.grad) for w in params]))
                clip = group["max_grad_norm"] / norm.clamp_min(group["max_grad_norm"])
            for w in params:
                self._update(w, w.grad * clip, group)
        return loss

    def _update(self, w: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[w]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=w.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(w), torch.zeros_like(w)
        (beta_1, beta_2), m, v = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        m.mul_(beta_1).add_(g, alpha=1 - beta_1)
        v.mul_(beta_2).addcmul_(g, g, value=1 - beta_2)
        deviation = (v / (1 - beta_2 ** state["step"])).sqrt() + group["eps"]
        u = m / (1 - beta_1 ** state["step"]) / deviation + group["weight_decay"] * w
        w_norm, u_norm = torch.linalg.vector_norm(w), torch.linalg.vector_norm(u)
        trust = torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
        w.sub_(u * (trust * group["lr"]))


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
