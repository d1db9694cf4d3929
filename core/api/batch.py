"""The vocabulary of a training step and of an evaluation. Imports without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__: list[str] = []  # `core.api.types` is where plugins find them

Purpose = Literal["train", "evaluate", "warm_up"]
"""What a batch is for: a counted step, the evaluation, or a pass before the clock starts that leaves no trace."""


@dataclass(slots=True)
class Batch:
    """This data rank's share of one global batch. A pytree, once `core.api.tree` is imported."""

    data: Any  # a pytree of tensors whose shapes the workload documents
    samples: int  # examples that the step consumes, over all data ranks; 0 in evaluation, where nothing counts them
    weight: float = 1.0
    """Local examples x data ranks / global examples: the mean over data ranks of weighted losses is the global mean."""


Outputs = dict[str, "Tensor"]
Forward = Callable[[Any], Any]  # inference: `batch.data -> pytree of tensors`, on the device, without gradient
Pending = Callable[[bool], dict[str, float] | None]
"""An evaluation that runs beside the training: `pending(wait)` gives the quality, or None while it is not known and
not to be waited for. Every rank asks after the same step and is given the same answer."""
Quality = dict[str, float] | Pending
"""What an evaluation of the whole evaluation set gives: its value by metric, at once or later."""
Evaluate = Callable[[Forward], Quality]
Step = Callable[[Batch], Outputs]
"""One training step: device tensors out, no host synchronisation; "loss" is the mean loss times `Batch.weight`."""


@dataclass(frozen=True)
class StepParts:
    """The two halves of a training step. `forward_backward` leaves gradients; `update` applies and then clears them."""

    forward_backward: Step
    update: Callable[[], None]
    micro_batches: int = 1  # passes that `forward_backward` cuts a batch into; gradients are whole after the last


@dataclass(frozen=True, kw_only=True)
class Capture:
    """How much of a training step can be captured into a graph: all of it, parts of the model, or nothing."""

    step: bool = False
    parts: tuple[str, ...] = ()  # names of the model's submodules that can be, where the step as a whole cannot


@dataclass(frozen=True)
class Target:
    """One quality threshold; a run succeeds when all of its workload's targets are met."""

    metric: str
    value: float
    higher_is_better: bool = True
    log_name: str = ""  # its key in mllog's eval_accuracy where a workload has several targets, such as "BBOX"

    def met(self, quality: Mapping[str, float]) -> bool:
        value = quality[self.metric]
        return value >= self.value if self.higher_is_better else value <= self.value


@dataclass(frozen=True)
class EvalCadence:
    """When to evaluate: after `first`, then after every `every` epochs or samples (v1.1 rules, "evaluate every")."""

    every: int
    first: int
    unit: Literal["epochs", "samples"] = "epochs"

    def next_after(self, done: int) -> int:
        """The first evaluation point beyond `done` epochs or samples."""
        return self.first if done < self.first else self.first + ((done - self.first) // self.every + 1) * self.every


@dataclass
class Position:
    """Where training stands; saved in every checkpoint. Epochs count from 1 (v1.1 rules)."""

    epoch: int = 1
    batch: int = 0  # batches of this epoch that are done
    step: int = 0
    samples: int = 0

    @property
    def epochs_done(self) -> int:
        """Epochs started, or finished where none is in progress."""
        return self.epoch - (self.batch == 0)
