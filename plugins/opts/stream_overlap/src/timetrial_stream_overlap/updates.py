"""Parameters that are updated in the backward pass, as soon as their gradients are final."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from core.api.types import StepParts
from timetrial_stream_overlap.window import span

UPDATE = "stream_overlap.update"
"""The name under which a trace shows the update of one bucket's parameters."""

CommunicationHook = Callable[[Any, dist.GradBucket], Future[Tensor]]


class BackwardUpdates:
    """Makes the steps of an optimizer bucket by bucket: each with the optimizer's own `step`, which for the time being
    sees the parameters of this bucket alone. State and hyperparameters stay where they are, so that checkpoints and
    learning-rate schedules do not notice.

    It starts with `armed`, since the warm-up runs backward passes that must change nothing.
    """

    optimizer: torch.optim.Optimizer
    """Set by `bind`."""

    def __init__(self, device: torch.device) -> None:
        self.armed = False
        self.steps = self.buckets = self.late = 0
        """Steps made; buckets updated in their backward passes; parameters that were not, and were updated after."""
        self._device = device
        self._lock = threading.Lock()  # gloo ends the exchange of two buckets on two threads
        self._done = set[int]()
        self._arrived: list[set[int]] = []
        self._stream: torch.Stream | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        groups = optimizer.param_groups
        self._parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        self._group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
        self._changed = [{} for _ in groups]

    # ---------------------------------------------------------------------------------- when a gradient is final

    def after(self, hook: CommunicationHook) -> CommunicationHook:
        """`hook` for DistributedDataParallel, with the update of the bucket's parameters behind the exchange."""

        def exchange_then_update(state, bucket):  # torch refuses annotations that are strings
            future = hook(state, bucket)
            if not self.armed:
                return future
            buffer, parameters = bucket.buffer(), bucket.parameters()
            return future.then(lambda exchanged: self._update_bucket(buffer, parameters, exchanged.value()))

        return exchange_then_update

    def _update_bucket(self, buffer: Tensor, parameters: Sequence[nn.Parameter], exchanged: Tensor) -> Tensor:
        """Runs when the exchange ends: on a thread of gloo's; for NCCL, at once, on a stream that waits for it."""
        if exchanged.data_ptr() != buffer.data_ptr():
            buffer.copy_(exchanged)
        offset = buffer.storage_offset()
        for parameter in parameters:
            # Not bucket.gradients(): its views are row-major, but gradients there have their parameter's layout.
            parameter.grad = buffer.as_strided(parameter.shape, parameter.stride(), offset)
            offset += parameter.numel()
        self._update(parameters)
        return buffer

    def watch(self, cap_bytes: int) -> None:
        """Without DistributedDataParallel: updates each bucket as soon as autograd has accumulated its gradients."""
        if self._device.type != "cpu":
            self._stream = torch.Stream(self._device)
        for parameters in buckets(reversed(self._parameters), cap_bytes):
            arrived = set[int]()
            self._arrived.append(arrived)

            def note(parameter: Tensor, bucket: list[nn.Parameter] = parameters, arrived: set[int] = arrived) -> None:
                if self.armed:
                    arrived.add(id(parameter))
                    if len(arrived) == len(bucket):
                        arrived.clear()
                        self._update_beside(bucket)

            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(note)

    def _update_beside(self, parameters: Sequence[nn.Parameter]) -> None:
        """On a separate stream, where there are streams."""
        if self._stream is not None:
            self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream or nullcontext():
            self._update(parameters)

    # ------------------------------------------------------------------------------------------------ the update

    def _update(self, parameters: Iterable[nn.Parameter]) -> None:
        with self._lock, span(UPDATE):
            self.buckets += 1
            whole = self.optimizer.param_groups
            chosen = defaultdict[int, list[nn.Parameter]](list)
            for parameter in parameters:
                if id(parameter) in self._group_of:
                    chosen[self._group_of[id(parameter)]].append(parameter)
                    self._done.add(id(parameter))
            parts = {number: {**whole[number], "params": params} for number, params in chosen.items()}
            self.optimizer.param_groups = list(parts.values())
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = whole
            for number, part in parts.items():  # a count that the optimizer keeps in its groups: once a step, too
                old = whole[number]
                self._changed[number].update({k: v for k, v in part.items() if k != "params" and v is not old.get(k)})

    def finish(self) -> None:
        """The second half of a step: all that is left to do is to clear the gradients."""
        self.steps += 1
        if len(self._done) < len(self._parameters):
            for arrived in self._arrived:
                arrived.clear()
            late = [p for p in self._parameters if p.grad is not None and id(p) not in self._done]
            if late:
                self.late += len(late)
                self._update_beside(late)
                self.buckets -= 1
        self._done.clear()
        for group, changed in zip(self.optimizer.param_groups, self._changed, strict=True):
            group.update(changed)
            changed.clear()
        if self._stream is not None:
            torch.accelerator.current_stream(self._device).wait_stream(self._stream)
        self.optimizer.zero_grad()


def obstacle(optimizer: torch.optim.Optimizer, core: StepParts, parts: StepParts) -> str | None:
    """Why its updates cannot start before the last gradient is there; None if they can.

    `parts` is what the other opts made of core's halves of the step.
    """
    clipped = [group["max_grad_norm"] for group in optimizer.param_groups if group.get("max_grad_norm")]
    if clipped:
        return f"the optimizer clips by the norm of all gradients together (max_grad_norm={clipped[0]:g})"
    if isinstance(optimizer, torch.optim.LBFGS):
        return "LBFGS takes all gradients at once, several times a step"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer):
        return "another plugin acts on the optimizer's step as a whole"
    if parts.update is not core.update:
        return "another opt changes the update"
    return None


def average(group, bucket):  # torch refuses annotations that are strings
    """The mean over a group, with the bits of DistributedDataParallel's own, which multiplies before it sums."""
    buffer = bucket.buffer().mul_(1.0 / dist.get_world_size(group))
    return dist.all_reduce(buffer, group=group, async_op=True).get_future().then(lambda done: done.value()[0])


def buckets(parameters: Iterable[nn.Parameter], cap_bytes: int) -> list[list[nn.Parameter]]:
    """Consecutive parameters, as torch's DistributedDataParallel cuts them: a bucket is full at `cap_bytes` or more."""
    found: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        found[-1].append(parameter)
        size += parameter.nbytes
        if size >= cap_bytes:
            found.append([])
            size = 0
    return [bucket for bucket in found if bucket]
