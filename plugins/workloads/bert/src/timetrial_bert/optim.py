"""LAMB, the learning-rate schedule and the parameter groups of the v1.1 rules for bert."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive moments (You et al. 2019, arXiv:1904.00962, algorithm 2), with the gradient clipping of the
    MLPerf reference (mlcommons/training, language_model/tensorflow/bert/optimization.py, clip_by_global_norm).

        g = g * min(1, max_grad_norm / |all gradients|)               where max_grad_norm is given
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g^2
        u = m' / (sqrt(v') + eps) + weight_decay * w                   m' = m / (1 - beta_1^t), v' = v / (1 - beta_2^t)
        w = w - lr * trust * u                                         trust = |w| / |u|, 1 where either is 0

    Each parameter group may set `lr` (a float, or a tensor on the parameters' device), `betas`, `eps`, `weight_decay`,
    `bias_correction` (False: m' = m and v' = v, as in Google's own version, google-research/albert,
    lamb_optimizer.py), `max_grad_norm` (None or 0: no clipping; the norm is that of every group's gradients together)
    and `adapt` (False: trust = 1). State: `step` (a float32 scalar on the device), `exp_avg` and `exp_avg_sq`. Nothing
    waits for the device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        max_grad_norm: float | None = 1.0,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_grad_norm": max_grad_norm,
            "adapt": adapt,
            "capturable": True,  # tells torch that a restored `step` belongs on the parameter's device
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm = self._global_norm() if any(group["max_grad_norm"] for group in self.param_groups) else None
        for group in self.param_groups:
            clip = None
            if group["max_grad_norm"]:
                assert norm is not None
                clip = group["max_grad_norm"] / norm.clamp_min(group["max_grad_norm"])
            for w in group["params"]:
                if w.grad is not None:
                    self._update(w, w.grad if clip is None else w.grad * clip, group)
        return loss

    def _global_norm(self) -> Tensor:
        grads = [w.grad for group in self.param_groups for w in group["params"] if w.grad is not None]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))

    def _update(self, w: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[w]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=w.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(w), torch.zeros_like(w)
        (beta_1, beta_2), m, v = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        m.mul_(beta_1).add_(g, alpha=1 - beta_1)
        v.mul_(beta_2).addcmul_(g, g, value=1 - beta_2)
        if group["bias_correction"]:
            m, v = m / (1 - beta_1 ** state["step"]), v / (1 - beta_2 ** state["step"])
        u = m / (v.sqrt() + group["eps"])
        if group["weight_decay"]:
            u += group["weight_decay"] * w
        rate = group["lr"]
        if group["adapt"]:
            w_norm, u_norm = torch.linalg.vector_norm(w), torch.linalg.vector_norm(u)
            rate = rate * torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
        w.sub_(u * rate)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings; then biases and layer normalisation, which neither decay nor adapt
    (reference: optimization.py, exclude_from_weight_decay, which LAMB takes for its adaptation, too)."""
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


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
        return self.base * (1 - min(step, self.training_steps) / self.training_steps) ** self.power
