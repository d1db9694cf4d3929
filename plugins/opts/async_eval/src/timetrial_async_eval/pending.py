"""The training side: weights go to the evaluator, qualities come back, and what was hidden behind steps is counted."""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import time
from dataclasses import replace

import torch

from core.api.errors import TimetrialError
from core.api.types import Forward, Pending, RunContext
from core.compose.plan import RunPlan
from timetrial_async_eval.process import Order, serve


class Evaluations:
    """The evaluator process beside rank 0, started and ready when this returns; on other ranks, what rank 0 says.

    One evaluation goes on at a time: the loop settles it before it begins another.
    """

    def __init__(self, ctx: RunContext, device: str, threads: int | None) -> None:
        self._ctx = ctx
        self.count, self.took_s, self.overlapped_s, self.snapshot_s = 0, 0.0, 0.0, 0.0
        problem = self._start(device, threads or torch.get_num_threads()) if ctx.rank == 0 else None
        problem = ctx.backend.broadcast(problem)
        if problem:
            raise TimetrialError(f"opt 'async_eval': {problem}; leave it out")

    def _start(self, device: str, threads: int) -> str | None:
        """Starts the process; returns what went wrong, if anything."""
        plan = RunPlan.load(self._ctx.run_dir / "resolved.yaml")
        mine = [p for p in plan.plugins if p.name != "async_eval" and "multi_rank" not in p.load().spec.requires]
        order = Order(replace(plan, plugins=mine, seed=self._ctx.seed), str(self._ctx.run_dir), device, threads)
        spawn = multiprocessing.get_context("spawn")  # not fork: this process has threads, and perhaps a GPU
        self._pipe, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(order, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        atexit.register(process.kill)
        return self._receive()[1]

    def begin(self, infer: Forward) -> Pending:
        """Hands over the weights as they are now; training may then go on."""
        started = time.perf_counter()
        states = {"model": self._ctx.model.state_dict(), "workload": self._ctx.workload.state_dict()}
        if self._ctx.rank == 0:
            buffer = io.BytesIO()
            torch.save(states, buffer)
            with contextlib.suppress(OSError):  # an evaluator that is gone is noticed when it is asked
                self._pipe.send_bytes(buffer.getbuffer())
        self._begun_at = time.perf_counter()
        self.snapshot_s += self._begun_at - started
        return self._result

    def _result(self, wait: bool) -> dict[str, float] | None:
        """`core.api.types.Pending`. TimetrialError, on every rank, where the evaluator failed."""
        asked = time.perf_counter()
        answer = self._receive() if self._ctx.rank == 0 and (wait or self._pipe.poll()) else None
        answer = self._ctx.backend.broadcast(answer)
        if answer is None:
            return None
        quality, problem, took_s = answer
        if problem:
            raise TimetrialError(f"the evaluator process failed: {problem}")
        self.count += 1
        self.took_s += took_s
        self.overlapped_s += min(took_s, asked - self._begun_at)
        return quality

    def _receive(self) -> tuple[dict[str, float], str | None, float]:
        """The evaluator's next word: a quality or a problem, and the seconds that it took."""
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            return {}, "it ended without a word, perhaps for want of memory", 0.0
