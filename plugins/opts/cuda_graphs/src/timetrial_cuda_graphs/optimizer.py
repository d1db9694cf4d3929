"""Optimizers under capture: the learning rate in a tensor on the device, nothing that counts on the host.

A recording takes every number of the host as fixed. So the learning rate, which changes from step to step, must be read
from device memory, and so must a count of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.api.errors import UsageError

REMEDY = "add +opt=fused_optimizer"


def make_capturable(optimizer: torch.optim.Optimizer, on_load: Callable[[], None]) -> bool:
    """Prepares `optimizer` in place. Returns whether its updates may round otherwise than before.

    torch's SGD reads a learning-rate tensor on the device in its fused kernel alone; its other optimizers do where
    `capturable` is set. Whether a foreign one does, recording shows (`replayable`). Loading a state puts new
    tensors in the place of the old: the learning rate goes back to its address, and `on_load` is told.
    """
    rounds_otherwise = _switch(optimizer)
    rates = [_rate_tensor(group) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        rounds_otherwise |= group["lr"] is not rate
        group["lr"] = rate

    def restore(loaded: torch.optim.Optimizer) -> None:
        _switch(loaded)
        for group, rate in zip(loaded.param_groups, rates, strict=True):
            if group["lr"] is not rate:
                group["lr"] = rate.fill_(float(group["lr"]))
        for parameter, state in loaded.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.to(parameter.device)
        on_load()

    optimizer.register_load_state_dict_post_hook(restore)
    return rounds_otherwise


def _switch(optimizer: torch.optim.Optimizer) -> bool:
    """Sets torch's own flags; returns whether one was not set before."""
    flag = "fused" if type(optimizer) is torch.optim.SGD else "capturable"
    changed = False
    for group in optimizer.param_groups:
        if flag in group and not group[flag]:
            group[flag] = changed = True
            if flag == "fused":
                group["foreach"] = False
    # torch warns where a capturable optimizer makes an eager step; the warm-up means to.
    optimizer._warned_capturable_if_run_uncaptured = True  # pyright: ignore[reportAttributeAccessIssue]
    return changed


def _rate_tensor(group: dict[str, Any]) -> Tensor:
    """The group's learning rate as a float32 scalar beside its parameters: itself, if it is one."""
    rate, device = group["lr"], group["params"][0].device
    if isinstance(rate, Tensor) and rate.device == device:
        return rate
    return torch.tensor(float(rate), dtype=torch.float32, device=device)


def replayable(
    capture: Callable[[Callable[[], Any]], Any], optimizer: torch.optim.Optimizer
) -> Callable[[Callable[[], Any]], Any]:
    """`capture` of a step of `optimizer`; UsageError where a replay of the step would not do what the step does.

    Recording runs the step's Python code once: a number on the host that changes meanwhile is one that replays leave as
    it is, and a tensor that is new is one that replays would fill or forget each time.
    """

    def record(function: Callable[[], Any]) -> Any:
        before = _kept(optimizer)
        recorded = capture(function)
        changed = {
            key for (owner, key), value in _kept(optimizer).items() if not _same(before.get((owner, key)), value)
        }
        if changed:
            name, keys = type(optimizer).__name__, ", ".join(sorted(changed))
            raise UsageError(f"{name} changes {keys} on the host, where a graph would freeze it: {REMEDY}")
        return recorded

    return record


def _kept(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    """What the optimizer's groups and state hold, by owner and key: numbers of the host, and tensors on the device."""
    owners: list[dict[str, Any]] = [*optimizer.param_groups, *optimizer.state.values()]
    return {
        (number, key): value.item() if isinstance(value, Tensor) and value.is_cpu and value.numel() == 1 else value
        for number, owner in enumerate(owners)
        for key, value in owner.items()
        if isinstance(value, int | float | Tensor)
    }


def _same(before: Any, after: Any) -> bool:
    return before is after if isinstance(after, Tensor) else before == after
