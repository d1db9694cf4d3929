"""The rank's side: weights go to the evaluator, qualities come back, and what was hidden behind steps is counted."""

from __future__ import annotations

import time

import torch

from core.api.errors import TimetrialError
from core.api.types import Forward, Pending, RunContext


class Evaluations:
    """The evaluator beside rank 0, ready when this returns; the other ranks are told what rank 0 hears from it.

    Only one evaluation runs at a time: the loop settles it before it starts another.
    """

    def __init__(self, ctx: RunContext, device: str, threads: int | None) -> None:
        self._ctx = ctx
        self.count, self.took_s, self.overlapped_s, self.snapshot_s = 0, 0.0, 0.0, 0.0
        problem = ""
        if ctx.rank == 0:
            serve = "timetrial_async_eval.serve:serve"
            self._evaluator = ctx.start_sidecar("async_eval", serve, device, threads or torch.get_num_threads())
            problem = self._evaluator.ready().problem
        problem = ctx.backend.broadcast(problem)
        if problem:
            raise TimetrialError(f"opt 'async_eval': {problem}; leave it out")

    def begin(self, infer: Forward) -> Pending:
        """Hands over the weights as they are now; training may then continue."""
        started = time.perf_counter()
        states = {"model": self._ctx.layout.model_state(), "workload": self._ctx.workload.state_dict()}
        if self._ctx.rank == 0:
            self._evaluator.ask(states)
        self._begun_at = time.perf_counter()
        self.snapshot_s += self._begun_at - started
        return self._result

    def _result(self, wait: bool) -> dict[str, float] | None:
        """`core.api.types.Pending`. TimetrialError, on every rank, where the evaluator failed."""
        asked = time.perf_counter()
        reply = None
        if self._ctx.rank == 0 and (wait or self._evaluator.has_answered()):
            reply = self._evaluator.answer()
        reply = self._ctx.backend.broadcast(reply)
        if reply is None:
            return None
        if reply.problem:
            raise TimetrialError(f"the evaluator process failed: {reply.problem}")
        self.count += 1
        self.took_s += reply.seconds
        self.overlapped_s += min(reply.seconds, asked - self._begun_at)
        return reply.value
