"""The one timed loop. Read this file first: everything else builds its arguments or records its results.

A run is a sequence of *blocks*: train until the next evaluation is due, evaluate, stop if the target is met. The clock
(v1.1 rules, section 7.4) runs from the first touch of the data to the detection of the target and never pauses.
"""

from collections.abc import Callable, Iterable

from core.api.types import Batch, Quality, RunContext, Step
from core.engine.watch import Watch


def train(
    ctx: RunContext,
    watch: Watch,
    step: Step,
    batches: Callable[[int, int], Iterable[Batch]],
    evaluate: Callable[[], Quality] | None,
) -> str:
    """Trains to the target. Returns the status: success, not_converged, stopped or throughput.

    Every callable is already composed from the workload and the opts. `batches(epoch, first_batch)` gives the rest of
    an epoch; `evaluate` is None on synthetic data, which has no quality. DivergedError where a number is not finite.
    """
    position, workload = watch.position, ctx.workload
    max_epochs = min(workload.max_epochs, ctx.config.stop.epochs or workload.max_epochs)
    losses = watch.losses  # on the device: reading one would make the host wait for the step

    def meets_target(evaluate: Callable[[], Quality]) -> bool:
        """Ends the block and evaluates. While an evaluation runs beside the training, each look polls it."""
        if watch.settle():
            return True
        watch.close_block()
        return watch.judge(evaluate())

    if evaluate and watch.evaluation_is_due() and meets_target(evaluate):  # the run was killed just before it
        return "success"
    while position.epoch <= max_epochs:
        watch.open_block()
        for batch in batches(position.epoch, position.batch):
            learning_rate = workload.learning_rate(position.step)
            for group in ctx.optimizer.param_groups:
                if isinstance(group["lr"], float):
                    group["lr"] = learning_rate
                else:  # a tensor on the device, where a captured graph reads it
                    group["lr"].fill_(learning_rate)
            losses[position.step - watch.looked] = step(batch)["loss"]
            position.batch += 1
            position.step += 1
            position.samples += batch.samples
            if position.step >= watch.due:  # about once a second, at a step that all ranks agree on
                status = watch.look()
                if status:
                    return status
            if evaluate and watch.evaluation_is_due():  # here, where the cadence counts samples
                if meets_target(evaluate):
                    return "success"
                watch.open_block()
        position.epoch += 1
        position.batch = 0
        last = position.epoch > max_epochs and watch.evaluated_step != position.step
        if evaluate and (last or watch.evaluation_is_due()) and meets_target(evaluate):
            return "success"
    if watch.settle():
        return "success"
    return "not_converged" if evaluate else "throughput"
