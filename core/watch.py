"""What happens beside the steps, about once a second: is the loss finite, has a signal come, is a checkpoint due?

All ranks look after the same step and exchange one short list of numbers, so that they decide alike. Between two looks
the loop runs bare: a look costs about a millisecond, a step nothing.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from mlperf_logging.mllog import constants

from core.checkpoint import gathered
from core.errors import EXIT_FAILED, DivergedError, StoppedError
from core.progress import Progress
from core.record import Record
from core.types import Position, RunContext

_MAX_INTERVAL = 10_000
"""Most steps between two looks, whatever their speed: losses are held as device scalars in between."""


class Clock:
    """Seconds since the run started. A resumed run carries on; in between, the wall clock has gone on as well."""

    def __init__(self) -> None:
        self.started_at = 0.0  # Unix time of the very first start
        self._carried, self._start = 0.0, 0.0

    def carry(self, seconds: float, started_at: float) -> None:
        """Takes over from the run that is continued."""
        self._carried, self.started_at = seconds, started_at

    def start(self) -> None:
        self._start = time.perf_counter()
        self.started_at = self.started_at or time.time()

    def seconds(self) -> float:
        """Time on the clock in the processes that ran, in seconds."""
        return self._carried + time.perf_counter() - self._start


class Signals:
    """SIGTERM or Ctrl-C once: save and stop. Twice: leave at once, taking child processes along."""

    def __init__(self) -> None:
        self.requested = False
        self.on_request: Callable[[], None] | None = None
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            for child in psutil.Process().children(recursive=True):
                child.kill()
            os._exit(EXIT_FAILED)
        self.requested = True
        if self.on_request is None:
            raise StoppedError("stopped before training began; the same command starts it again")
        self.on_request()

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Watch:
    """Looks after the loop. `due` is the step at which to look next, the same on every rank."""

    save: Callable[[], None]
    """Writes a checkpoint; set once all that it saves exists."""

    def __init__(self, ctx: RunContext, clock: Clock, record: Record, hooks: Any, signals: Signals) -> None:
        self.ctx, self.clock, self.record, self.hooks, self.signals = ctx, clock, record, hooks, signals
        self._mllog = record.mllog
        workload = ctx.workload
        self.progress = Progress(ctx.rank == 0, workload.targets, workload.max_epochs, workload.train_samples)
        self.due = 1
        self.block_epoch = 0
        """First epoch of the open block; 0 between blocks."""
        self.train_seconds = 0.0
        """Time spent in blocks, without evaluation."""
        self._look_at = self._saved_at = time.perf_counter()
        self._last = Position()
        if ctx.world_size == 1:
            signals.on_request = self._look_now
        else:
            signals.on_request = lambda: None  # at the next look, together with the other ranks

    def _look_now(self) -> None:
        self.due = 0

    def begin(self, position: Position) -> None:
        """Starts the clock; `position` is where training (re)starts."""
        self.clock.start()
        self._last = Position(**vars(position))
        self._look_at = self._saved_at = time.perf_counter()
        self._schedule(position.step, 1)

    # -------------------------------------------------------------------------------------------------- blocks

    def open_block(self, position: Position) -> None:
        """Starts a block unless one is open, as it is after a resume in its middle."""
        if self.block_epoch == 0:
            self.block_epoch = position.epoch
            cadence = self.ctx.workload.eval_cadence
            count = cadence.next_after(position.epoch - 1) - position.epoch + 1 if cadence.unit == "epochs" else 1
            self._mllog.start(constants.BLOCK_START, None, {"first_epoch_num": position.epoch, "epoch_count": count})
            self.hooks.on_block(ctx=self.ctx, position=position, event="start")
            self._look_at = time.perf_counter()

    def close_block(self, position: Position, losses: list[torch.Tensor]) -> None:
        """Ends the block once every loss and parameter in it is known to be finite."""
        if losses:
            self._exchange(position, losses)
        self._check_parameters(position)
        self._mllog.end(constants.BLOCK_STOP, None, {"first_epoch_num": self.block_epoch})
        self.hooks.on_block(ctx=self.ctx, position=position, event="stop")
        self._mllog.start(constants.EVAL_START, None, self._epoch_num(position))
        self.block_epoch = 0

    def evaluated(self, position: Position, quality: dict[str, float]) -> None:
        targets = self.ctx.workload.targets
        several = {target.log_name: quality[target.metric] for target in targets}
        accuracy = several if len(targets) > 1 else quality[targets[0].metric]
        self._mllog.event(constants.EVAL_ACCURACY, accuracy, self._epoch_num(position))
        self._mllog.end(constants.EVAL_STOP, None, self._epoch_num(position))
        seconds = self.clock.seconds()
        self.record.metrics(position, time_s=seconds, quality=quality)
        self.progress.evaluated(position, seconds, quality)
        self._look_at = time.perf_counter()
        if not all(map(math.isfinite, quality.values())):
            raise DivergedError(f"the quality after step {position.step} is not finite: {quality}", step=position.step)

    def _epoch_num(self, position: Position) -> dict[str, int]:
        """Metadata of an evaluation: epochs done, or samples where the cadence counts those (as BERT's does)."""
        by_samples = self.ctx.workload.eval_cadence.unit == "samples"
        return {"epoch_num": position.samples if by_samples else position.epochs_done}

    # --------------------------------------------------------------------------------------------------- looks

    def look(self, position: Position, losses: list[torch.Tensor]) -> str | None:
        """After step `position.step`. Returns the status with which to end the run, if it is to end."""
        stop_flag, save_flag, late_flag = self._exchange(position, losses)
        stop, checkpoint = self.ctx.config.stop, self.ctx.config.checkpoint
        out_of_steps = stop.steps is not None and position.step >= stop.steps
        save_now = checkpoint.every_steps is not None and position.step % checkpoint.every_steps == 0
        if stop_flag or save_flag or save_now:
            self._check_parameters(position)
            self.save()
            self._saved_at = time.perf_counter()
        if stop_flag:
            return "stopped"
        if out_of_steps or late_flag:
            return "throughput" if self.ctx.synthetic else "not_converged"
        return None

    def _schedule(self, step: int, interval: int) -> None:
        """The next look: in about a second, or sooner where the run is to stop or to save."""
        stop, every = self.ctx.config.stop.steps, self.ctx.config.checkpoint.every_steps
        dues = [step + interval]
        dues += [stop] if stop is not None and stop > step else []
        dues += [(step // every + 1) * every] if every else []
        self.due = min(dues)

    def _exchange(self, position: Position, losses: list[torch.Tensor]) -> tuple[bool, bool, bool]:
        """Checks and logs the losses since the last look. Returns (stop, save, out of time), agreed by all ranks."""
        local = torch.stack(losses).double().tolist()  # here the host waits for the device
        losses.clear()
        now = time.perf_counter()
        elapsed, steps = max(now - self._look_at, 1e-9), max(position.step - self._last.step, 1)
        stop, checkpoint = self.ctx.config.stop, self.ctx.config.checkpoint
        flags = [
            float(self.signals.requested),
            float(checkpoint.every_seconds is not None and now - self._saved_at >= checkpoint.every_seconds),
            float(stop.seconds is not None and self.clock.seconds() >= stop.seconds),
            min(max(1.0, round(self.ctx.config.log_seconds * steps / elapsed)), _MAX_INTERVAL),
        ]
        table = self.ctx.backend.all_gather(flags + local)
        # Rank 0's clock decides; a signal counts whichever rank received it.
        _, save, late, interval = table[0][: len(flags)]
        self._schedule(position.step, int(interval))
        # Losses carry their batch's weight, so their mean over ranks is the mean over the global batch.
        per_step = [
            math.fsum(column) / len(table) for column in zip(*(row[len(flags) :] for row in table), strict=True)
        ]
        first = position.step - len(per_step) + 1
        for offset, loss in enumerate(per_step):
            if not math.isfinite(loss):
                rank = next(r for r, row in enumerate(table) if not math.isfinite(row[len(flags) + offset]))
                what = f"the loss of step {first + offset} is {table[rank][len(flags) + offset]} on rank {rank}"
                remedy = "lower the learning rate, or look at the input of that step"
                raise DivergedError(f"{what}: {remedy}", rank=rank, step=first + offset)
        self.train_seconds += elapsed
        speed = (position.samples - self._last.samples) / elapsed
        values = {
            "loss": math.fsum(per_step) / len(per_step),
            "learning_rate": float(self.ctx.optimizer.param_groups[0]["lr"]),
            "samples_per_s": speed,
        }
        seconds = self.clock.seconds()
        self.record.metrics(position, time_s=seconds, **values, losses=per_step)
        self.progress.update(position, seconds, values)
        self.hooks.on_log(ctx=self.ctx, position=position, values=values)
        self._last, self._look_at = Position(**vars(position)), now
        return any(row[0] for row in table), bool(save), bool(late)

    def _check_parameters(self, position: Position) -> None:
        """A gradient that is not finite shows in the parameters before it shows in a loss."""
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm(self.ctx.model.parameters(), norm_type=math.inf)
            finite = bool(torch.isfinite(gathered(norm)))
        ranks = [r for r, (ok,) in enumerate(self.ctx.backend.all_gather([float(finite)])) if not ok]
        if ranks:
            raise DivergedError(
                f"a parameter is not finite after step {position.step} on rank {ranks[0]}: the gradient overflowed; "
                "lower the learning rate",
                rank=ranks[0],
                step=position.step,
            )
