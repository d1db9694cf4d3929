"""What happens beside the steps, about once a second: is the loss finite, has a signal come, is a checkpoint due?

All ranks look after the same step and exchange one short list of numbers, so that they decide alike. A look costs about
a millisecond, a step none of it.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch

from core.api.errors import EXIT_CODES, DivergedError, StoppedError
from core.api.progress import Progress
from core.api.types import Position, Quality, RunContext
from core.state.record import Metrics
from core.state.report import quality_text

_MAX_INTERVAL = 10_000  # maximum steps between two looks; that many losses are kept on the device
_SAVED = ("quality", "evaluated_step", "next_eval", "block_epoch", "block_epochs", "train_seconds", "started_at")
"""What a checkpoint holds of a watch, besides its position and its clock."""


class Signals:
    """SIGTERM or Ctrl-C once: save and stop. Twice: leave at once, taking child processes along."""

    def __init__(self) -> None:
        self.requested = False
        self.watch: Watch | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            for child in psutil.Process().children(recursive=True):
                child.kill()
            os._exit(EXIT_CODES["failed"])
        self.requested = True
        if self.watch is None:
            raise StoppedError("stopped before training began; run the same command to start it again")
        if self.watch.ctx.world_size == 1:  # it looks after this very step; several ranks do so when they are due
            self.watch.due = 0


class Watch:
    """Looks after the loop. `due` is the step at which to look next, the same on every rank."""

    def __init__(
        self, ctx: RunContext, metrics: Metrics, hooks: Any, signals: Signals, save: Callable[[], None]
    ) -> None:
        self.ctx, self.metrics, self.hooks, self.signals, self.save = ctx, metrics, hooks, signals, save
        self.position, self.progress = ctx.position, Progress(ctx.rank == 0)
        self.due = 1
        # The losses since the last look, which came after step `looked`. In one buffer, since keeping each step's own
        # scalar leaves holes in the heap: the next step's large tensors then are in cold memory (50 us of 1 ms).
        self.losses, self.looked = torch.zeros(_MAX_INTERVAL, device=ctx.device), 0
        self._by_samples = ctx.workload.eval_cadence.unit == "samples"
        self.next_eval = ctx.workload.eval_cadence.next_after(0)  # in the cadence's unit: samples, or finished epochs
        self._targets = {target.metric: target.value for target in ctx.workload.targets}
        self.quality: dict[str, float] = {}  # of the last evaluation, which came after step `evaluated_step`
        self.evaluated_step = -1
        self._under_way: tuple[Quality, Position, int] | None = None  # with position and count
        self.block_epoch = self.block_epochs = 0  # the first epoch of the open block, and how many; 0 between blocks
        self.train_seconds = 0.0  # spent in blocks, without evaluation
        self.started_at = 0.0  # Unix time of the very first start
        self._carried = 0.0  # seconds on the clock of the run that is continued
        signals.watch = self

    def state_dict(self) -> dict[str, Any]:
        rest = {"metrics": self.metrics.offset(), "clock_s": self.seconds(), "position": vars(self.position)}
        return {name: getattr(self, name) for name in _SAVED} | rest

    def load_state_dict(self, state: Mapping[str, Any], same_folder: bool) -> None:
        """In another folder than the one that the state was saved in the run begins with a block."""
        vars(self).update((name, state[name]) for name in _SAVED)
        vars(self.position).update(state["position"])
        self._carried = state["clock_s"]
        self.next_eval = min(self.next_eval, self.ctx.workload.eval_cadence.next_after(self._done))
        if not same_folder:
            self.block_epoch = 0

    def begin(self) -> None:
        """Starts the clock, from where training (re)starts."""
        self.started_at = self.started_at or time.time()
        self._started = self._look_at = self._saved_at = time.perf_counter()
        self.looked, self._samples = self.position.step, self.position.samples
        self._schedule(1)

    def seconds(self) -> float:
        """Time on the clock. A resumed run carries on; in between, the wall clock has gone on as well."""
        return self._carried + time.perf_counter() - self._started

    def open_block(self) -> None:
        """Starts a block unless one is open, as it is after a resume in its middle."""
        if self.block_epoch == 0:
            self.block_epoch = self.position.epoch
            self.block_epochs = 1 if self._by_samples else self.next_eval - self.position.epoch + 1
            self._tell_block("start")
            self._look_at = time.perf_counter()

    def close_block(self) -> None:
        """Ends the block once every loss and parameter in it is known to be finite; an evaluation follows."""
        if self.position.step > self.looked:
            self._exchange()
        self._check_parameters()
        self._end_block()
        self.hooks.on_eval(ctx=self.ctx, position=self.position, done=self._done, quality=None)

    def _end_block(self) -> None:
        self._tell_block("stop")
        self.block_epoch = 0

    def _tell_block(self, event: str) -> None:
        first, count = self.block_epoch, self.block_epochs
        self.hooks.on_block(ctx=self.ctx, position=self.position, event=event, first_epoch=first, epochs=count)

    @property
    def _done(self) -> int:
        """In the unit of the workload's cadence: samples, or finished epochs."""
        return self.position.samples if self._by_samples else self.position.epoch - 1

    def evaluation_is_due(self) -> bool:
        return self._done >= self.next_eval

    def judge(self, outcome: Quality) -> bool:
        """Receives an evaluation of the model as it is now. Returns whether it is known to have met every target."""
        self.evaluated_step, self.next_eval = self.position.step, self.ctx.workload.eval_cadence.next_after(self._done)
        self._under_way = outcome, replace(self.position), self._done
        return self.settle(wait=False)

    def settle(self, wait: bool = True) -> bool:
        """Records the evaluation in progress, if there is one and its quality is known; `wait` makes sure of that.
        Returns whether it met every target. DivergedError where the quality is not finite."""
        if self._under_way is None:
            return False
        outcome, position, done = self._under_way
        quality = outcome if isinstance(outcome, dict) else outcome(wait)
        if quality is None:
            return False
        self._under_way, self.quality, seconds = None, quality, self.seconds()
        self.metrics.write(position, time_s=seconds, quality=quality)
        self.progress.print(f"{seconds:8.1f} s  epoch {position.epochs_done:<3} {quality_text(quality, self._targets)}")
        self.hooks.on_eval(ctx=self.ctx, position=position, done=done, quality=quality)
        self._look_at = time.perf_counter()
        if not all(map(math.isfinite, quality.values())):
            raise DivergedError(f"the quality after step {position.step} is not finite: {quality}", step=position.step)
        met = all(target.met(quality) for target in self.ctx.workload.targets)
        if met and self.block_epoch:  # training went on meanwhile
            self._end_block()
        return met

    def look(self) -> str | None:
        """After a step. Returns the status with which to end the run, if it is to end."""
        stop_flag, save_flag, late_flag = self._exchange()
        step, stop, every = self.position.step, self.ctx.config.stop.steps, self.ctx.config.checkpoint.every_steps
        save_flag = stop_flag or save_flag or (every is not None and step % every == 0)
        late_flag = late_flag or (stop is not None and step >= stop)
        if self.settle(wait=save_flag or late_flag):  # a checkpoint holds no half-done evaluation
            return "success"
        if save_flag:
            self._check_parameters()
            self.save()
            self._saved_at = time.perf_counter()
        if stop_flag:
            return "stopped"
        if late_flag:
            return "throughput" if self.ctx.synthetic else "not_converged"
        return None

    def _schedule(self, interval: int) -> None:
        """The next look: in about a second, or sooner where the run is to stop or to save."""
        step, stop, every = self.position.step, self.ctx.config.stop.steps, self.ctx.config.checkpoint.every_steps
        dues = (stop if stop and stop > step else math.inf, (step // every + 1) * every if every else math.inf)
        self.due = min(step + interval, *dues)

    def _exchange(self) -> tuple[bool, bool, bool]:
        """Checks and logs the losses since the last look. Returns (stop, save, out of time), agreed by all ranks."""
        steps = self.position.step - self.looked
        local = self.losses[:steps].double().tolist()  # here the host waits for the device
        position, config, now, seconds = self.position, self.ctx.config, time.perf_counter(), self.seconds()
        elapsed = max(now - self._look_at, 1e-9)
        flags = [
            float(self.signals.requested),
            float(now - self._saved_at >= (config.checkpoint.every_seconds or math.inf)),
            float(seconds >= (config.stop.seconds or math.inf)),
            min(max(1.0, round(config.log_seconds * steps / elapsed)), _MAX_INTERVAL),
        ]
        table = self.ctx.backend.all_gather(flags + local)
        speakers = self.ctx.mesh.speakers
        # Rank 0's clock decides; a signal counts whichever rank received it.
        _, save, late, interval = table[0][: len(flags)]
        self._schedule(int(interval))
        losses = np.array(table)[list(speakers), len(flags) :].T  # by step and data rank
        for index, share in np.argwhere(~np.isfinite(losses)).tolist():
            step, rank = self.looked + index + 1, speakers[share]
            what = f"the loss of step {step} is {losses[index, share]} on rank {rank}"
            raise DivergedError(f"{what}: lower the learning rate, or check its input", rank=rank, step=step)
        # Losses carry their batch's weight, so their mean over data ranks is the mean over the global batch.
        means = losses.mean(axis=1).tolist()
        speed, workload = (position.samples - self._samples) / elapsed, self.ctx.workload
        rate = float(self.ctx.optimizer.param_groups[0]["lr"])
        values = {"loss": float(losses.mean()), "learning_rate": rate, "samples_per_s": speed}
        self.metrics.write(position, time_s=seconds, **values, losses=means)
        left = max(0, workload.max_epochs * workload.train_samples - position.samples) / speed if speed else 0.0
        quality = quality_text(self.quality, self._targets) or "not evaluated yet"
        self.progress.update(
            f"{seconds:8.1f} s  epoch {position.epoch}/{workload.max_epochs}  step {position.step}  "
            f"loss {values['loss']:.4f}  {speed:,.0f} samples/s  {quality}  at most {left:,.0f} s left"
        )
        self.hooks.on_log(ctx=self.ctx, position=position, values=values)
        self.train_seconds += elapsed
        self.looked, self._samples, self._look_at = position.step, position.samples, now
        return any(row[0] for row in table), bool(save), bool(late)

    def _check_parameters(self) -> None:
        """A gradient that is not finite shows in the parameters before it shows in a loss."""
        with torch.no_grad():
            parts = [part for part in self.ctx.layout.local_parameters() if part.numel()]
            norm = torch.nn.utils.get_total_norm(parts, norm_type=math.inf)
            finite = bool(torch.isfinite(norm))
        ranks = [r for r, (ok,) in enumerate(self.ctx.backend.all_gather([float(finite)])) if not ok]
        if ranks:
            rank, step = ranks[0], self.position.step
            what = f"a parameter is not finite after step {step} on rank {rank}: its gradient overflowed"
            raise DivergedError(f"{what}; lower the learning rate", rank=rank, step=step)
