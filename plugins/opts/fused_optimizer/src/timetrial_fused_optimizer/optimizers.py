"""SGD, AdamW, LARS and LAMB that update all parameters of a group in a handful of operations.

Nothing in a step depends on a value that only the device knows: the learning rate and the step counts are tensors
there, so that a step can be captured into a graph and the host never waits. State keys are those of the optimizers
that they replace. Letters: w is a parameter, g its gradient, lists run over the parameters of a group.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor functions without naming them in its types)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.api import reference
from core.api.errors import UsageError
from timetrial_fused_optimizer.observe import Counting, Observed

Group = dict[str, Any]
Work = tuple[Group, list[Tensor], list[Tensor]]
"""A parameter group, its parameters that have a gradient, and those gradients."""


class Fused(torch.optim.Optimizer):
    """What the four share: a learning rate on the device, state with the memory layout of its parameter.

    `groups` are another optimizer's, with all their settings. torch's fused kernels run over memory as it lies, without
    regard to strides: a gradient or a state that is laid out otherwise than its parameter would be applied to the wrong
    elements, so those are copied into its layout first.
    """

    def __init__(self, groups: list[Group]) -> None:
        self.seen: Observed | None = None
        """What the first step was made of."""
        rate = [torch.tensor(float(g["lr"]), device=g["params"][0].device) for g in groups]
        super().__init__([{**group, "lr": lr} for group, lr in zip(groups, rate, strict=True)], {})
        self._create_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, *_with_gradient(group["params"])) for group in self.param_groups]
        work = [(group, params, grads) for group, params, grads in work if params]
        if self.seen is not None:
            self._update(work)
        elif work:
            with Counting() as counting:
                self._update(work)
            self.seen = counting.observed(tensors=sum(len(params) for _, params, _ in work))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of this optimizer or of the one that it replaced; the learning rate stays where it is, since
        a captured graph reads it there."""
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate.fill_(group["lr"])
        for w, state in self.state.items():
            for key, value in state.items():
                value = torch.as_tensor(value, dtype=torch.float32) if key == "step" else value
                state[key] = _laid_out_as(w, value) if value.shape == w.shape else value.to(w.device)
        self._create_state()

    def _update(self, work: list[Work]) -> None:
        raise NotImplementedError

    def _state_keys(self, group: Group) -> tuple[str, ...]:
        """What is kept for each parameter of a group; "step" is a count, all else has the parameter's shape."""
        raise NotImplementedError

    def _create_state(self) -> None:
        """Zeros for all state that is missing: before the first step, so that it is a step like any other."""
        for group in self.param_groups:
            for w in group["params"]:
                for key in self._state_keys(group):
                    if key not in self.state[w]:
                        count = torch.zeros((), device=w.device)
                        self.state[w][key] = count if key == "step" else torch.zeros_like(w)

    def _lists(self, group: Group, params: list[Tensor]) -> list[list[Tensor]]:
        """The state of these parameters, one list for each key; step counts are those of the step to be made."""
        lists = {key: [self.state[w][key] for w in params] for key in self._state_keys(group)}
        if "step" in lists:
            torch._foreach_add_(lists["step"], 1)
        return list(lists.values())


class SGD(Fused):
    """torch.optim.SGD in torch's fused kernel. Without dampening, momentum from 0 on gives torch's first step, too."""

    def _state_keys(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, work: list[Work]) -> None:
        for group, params, grads in work:
            buffers = self._lists(group, params)
            torch._fused_sgd_(
                params, grads, buffers[0] if buffers else [],
                weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"], dampening=0.0,
                nesterov=group["nesterov"], maximize=group["maximize"], is_first_step=False,
            )  # fmt: skip


class AdamW(Fused):
    """torch.optim.AdamW in torch's fused kernel."""

    def _state_keys(self, group: Group) -> tuple[str, ...]:
        return ("step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))

    def _update(self, work: list[Work]) -> None:
        for group, params, grads in work:
            steps, exp_avgs, exp_avg_sqs, *largest = self._lists(group, params)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                params, grads, exp_avgs, exp_avg_sqs, largest[0] if largest else [], steps,
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=group["amsgrad"], maximize=group["maximize"],
            )  # fmt: skip


class LARS(Fused):
    """core.api.reference.LARS: the trust ratios of a group at once, then torch's fused SGD."""

    def _state_keys(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def _update(self, work: list[Work]) -> None:
        for group, params, grads in work:
            if group["adapt"]:
                decay = group["weight_decay"]
                w_norm, g_norm = _norms(params), _norms(grads)
                trust = group["eeta"] * w_norm / (g_norm + decay * w_norm + group["epsilon"])
                rates = group["lr"] * torch.where((w_norm > 0) & (g_norm > 0), trust, 1.0)
                scaled = torch._foreach_add(grads, params, alpha=decay)
                torch._foreach_mul_(scaled, list(rates.unbind()))
            else:
                scaled = torch._foreach_mul(grads, group["lr"])
            # With a learning rate of 1 the fused kernel does just the last two lines of the formula.
            torch._fused_sgd_(
                params, list(scaled), *self._lists(group, params),
                weight_decay=0.0, momentum=group["momentum"], lr=1.0, dampening=0.0,
                nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip


class LAMB(Fused):
    """core.api.reference.LAMB: directions from torch's fused Adam, then the trust ratios of a group at once. As
    `clip_grad_norm_` does, clipping changes the gradients in place."""

    def _state_keys(self, group: Group) -> tuple[str, ...]:
        return ("step", "exp_avg", "exp_avg_sq")

    def _update(self, work: list[Work]) -> None:
        clipped = any(group["max_grad_norm"] for group, _, _ in work)
        norm = torch.linalg.vector_norm(_norms([g for _, _, grads in work for g in grads])) if clipped else None
        for group, params, grads in work:
            updates = self._directions(group, params, grads, norm)  # -u
            if group["weight_decay"]:
                torch._foreach_add_(updates, params, alpha=-group["weight_decay"])
            if group["adapt"]:
                w_norm, u_norm = _norms(params), _norms(updates)
                trust = torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
                torch._foreach_addcmul_(params, updates, list((group["lr"] * trust).unbind()))
            else:
                torch._foreach_mul_(updates, group["lr"])
                torch._foreach_add_(params, updates)

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor], norm: Tensor | None) -> list[Tensor]:
        """-m / (sqrt(v) + eps) of each parameter, after taking the gradients into the moments.

        That is where torch's fused Adam moves a parameter that was 0, at a learning rate of 1. It divides the gradients
        by `grad_scale`.
        """
        steps, exp_avgs, exp_avg_sqs = self._lists(group, params)
        if not group["bias_correction"]:
            steps = [steps[0].new_full((), UNCORRECTED)] * len(params)
        directions = [torch.empty_like(w) for w in params]
        torch._foreach_zero_(directions)
        limit, (beta1, beta2) = group["max_grad_norm"], group["betas"]
        torch._fused_adam_(
            directions, grads, exp_avgs, exp_avg_sqs, [], steps,
            lr=1.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False,
            grad_scale=(norm / limit).clamp_min(1.0) if limit and norm is not None else None,
        )  # fmt: skip
        return directions


UNCORRECTED = 1e9
"""A step count at which 1 - beta^step is 1 for every beta up to 0.99999998: no bias left to correct."""

OPTIMIZERS: dict[type[torch.optim.Optimizer], type[Fused]] = {
    torch.optim.SGD: SGD,
    torch.optim.AdamW: AdamW,
    reference.LARS: LARS,
    reference.LAMB: LAMB,
}
"""Optimizers that are replaced, and by what."""


def fuse(inner: torch.optim.Optimizer) -> Fused:
    """The fused optimizer over the groups of `inner`, which must not have made a step.

    Raises UsageError where the class of `inner` is none of OPTIMIZERS. A subclass is not one of them: its step may be
    another.
    """
    kind, groups = OPTIMIZERS.get(type(inner)), inner.param_groups
    if kind is None:
        raise UsageError(
            f"fused_optimizer does not support the optimizer {_full_name(type(inner))}: leave it out; "
            f"it supports {', '.join(map(_full_name, OPTIMIZERS))}"
        )
    if any(group.get("dampening") for group in groups):
        raise UsageError("fused_optimizer does not support SGD with dampening: leave it out, or set dampening to 0")
    formats = {(w.dtype, w.device) for group in groups for w in group["params"]}
    if len(formats) > 1:
        raise UsageError(
            "fused_optimizer needs parameters of one dtype on one device, not "
            f"{', '.join(sorted(f'{dtype} on {device}' for dtype, device in formats))}: leave it out"
        )
    return kind([dict(group) for group in groups if group["params"]])


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _with_gradient(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    chosen = [w for w in params if w.grad is not None]
    return chosen, [_laid_out_as(w, w.grad) for w in chosen]  # pyright: ignore[reportArgumentType]


def _laid_out_as(w: Tensor, value: Tensor) -> Tensor:
    """`value` with the strides and on the device of `w`: itself, or a copy."""
    if value.stride() == w.stride() and value.device == w.device:
        return value
    return torch.empty_like(w, dtype=value.dtype).copy_(value)


def _norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of each, as one tensor."""
    return torch.stack(torch._foreach_norm(tensors))
