"""The one timed loop. Read this page first: everything else builds what it is given, or writes down what it did.

A run is a sequence of *blocks*: train until the next evaluation is due, evaluate, stop if the target is met. The clock
(v1.1 rules, section 7.4) runs from the first touch of the data to the detection of the target and never pauses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.types import Batch, Position, RunContext, Step

if TYPE_CHECKING:
    from torch import Tensor

    from core.watch import Watch


@dataclass(kw_only=True)
class Race:
    """What the loop is given: every callable is already composed from the workload and the opts."""

    ctx: RunContext
    position: Position
    step: Step
    batches: Callable[[int, int], Iterable[Batch]]
    """`(epoch, first batch)` to the rest of that epoch's batches."""
    evaluate: Callable[[], dict[str, float]] | None
    """None on synthetic data, which has no quality."""
    hooks: Any
    watch: Watch
    quality: dict[str, float] = field(default_factory=dict[str, float])
    """Of the last evaluation, which came after step `evaluated_step`."""
    evaluated_step: int = -1


def train(race: Race) -> str:
    """Trains to the target. Returns the status: success, not_converged, stopped or throughput.

    Raises DivergedError where a loss or a parameter is not finite.
    """
    ctx, position, step, watch = race.ctx, race.position, race.step, race.watch
    workload, groups = ctx.workload, ctx.optimizer.param_groups
    by_samples = workload.eval_cadence.unit == "samples"
    next_eval = _next_evaluation(race)
    max_epochs = min(workload.max_epochs, ctx.config.stop.epochs or workload.max_epochs)
    losses: list[Tensor] = []  # on the device: reading one would make the host wait for the step

    while position.epoch <= max_epochs:
        watch.open_block(position)
        for batch in race.batches(position.epoch, position.batch):
            learning_rate = workload.learning_rate(position.step)
            for group in groups:
                if isinstance(group["lr"], float):
                    group["lr"] = learning_rate
                else:  # a tensor on the device, where a captured graph reads it
                    group["lr"].fill_(learning_rate)
            losses.append(step(batch)["loss"])
            position.batch += 1
            position.step += 1
            position.samples += batch.samples
            if position.step >= watch.due:  # about once a second, at a step that all ranks agree on
                status = watch.look(position, losses)
                if status:
                    return status
            if by_samples and position.samples >= next_eval:
                if _evaluate(race, losses):
                    return "success"
                next_eval = _next_evaluation(race)
                watch.open_block(position)
        position.epoch += 1
        position.batch = 0
        last = position.epoch > max_epochs
        due = last if by_samples else last or position.epoch > next_eval
        if race.evaluate and due and race.evaluated_step != position.step:
            if _evaluate(race, losses):
                return "success"
            next_eval = _next_evaluation(race)
    return "not_converged" if race.evaluate else "throughput"


def _next_evaluation(race: Race) -> float:
    """In the unit of the workload's cadence: samples done, or the epoch after whose end it is due."""
    cadence, position = race.ctx.workload.eval_cadence, race.position
    if race.evaluate is None:
        return math.inf
    return cadence.next_after(position.samples if cadence.unit == "samples" else position.epoch - 1)


def _evaluate(race: Race, losses: list[Tensor]) -> bool:
    """Ends the block, evaluates, and says whether every target is met."""
    assert race.evaluate is not None
    position, workload = race.position, race.ctx.workload
    race.watch.close_block(position, losses)
    quality = race.evaluate()
    race.quality = quality
    race.evaluated_step = position.step
    race.watch.evaluated(position, quality)
    race.hooks.on_eval(ctx=race.ctx, position=position, quality=quality)
    return all(target.met(quality) for target in workload.targets)
