"""Optimizers and learning-rate schedules of the MLPerf references in their plainest form, for the workloads that train
with them and the opts that replace them. This module imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LAMB", "LARS", "parameter_groups", "polynomial_decay"]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv:1708.03888) as the MLPerf reference has it
    (mlcommons/training, image_classification/tensorflow2/lars_optimizer.py), the learning rate inside the momentum.

        trust = eeta * |w| / (|g| + weight_decay * |w| + epsilon)      1 where |w| or |g| is 0
        v     = momentum * v + lr * trust * (g + weight_decay * w)
        w     = w - v

    A parameter group with `adapt=False` (biases, batch normalisation) takes trust = 1 and no weight decay. `lr` may be
    a float or a tensor on the parameters' device. State: `momentum_buffer`. Nothing waits for the device.
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
        loss = _evaluate(closure)
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


class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive moments (You et al. 2019, arXiv:1904.00962, algorithm 2) after clipping the gradients, as the
    MLPerf references do (mlcommons/training, language_model/tensorflow/bert/optimization.py, clip_by_global_norm;
    rnn_speech_recognition/pytorch, FusedLAMB).

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
        loss = _evaluate(closure)
        norm = self._global_norm() if any(group["max_grad_norm"] for group in self.param_groups) else None
        for group in self.param_groups:
            limit = group["max_grad_norm"]
            clip = limit / norm.clamp_min(limit) if limit and norm is not None else None
            for w in group["params"]:
                if w.grad is not None:
                    self._update(w, w.grad if clip is None else w.grad * clip, group)
        return loss

    def _global_norm(self) -> Tensor | None:
        """Of all gradients together; None where there is none."""
        grads = [w.grad for group in self.param_groups for w in group["params"] if w.grad is not None]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])) if grads else None

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


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss, where torch's optional closure computes it anew."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, told apart by their dimensions: weights of layers and embeddings, which
    decay; biases, and scales and shifts of normalisation layers, which do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def polynomial_decay(step: float, *, base: float, end: float, steps: float, power: float) -> float:
    """The learning rate `step` steps into a decay from `base` to `end`, where it stays after `steps` steps:
    end + (base - end) * (1 - step / steps)^power (tf.compat.v1.train.polynomial_decay)."""
    return end + (base - end) * (1 - min(step / steps, 1.0)) ** power
