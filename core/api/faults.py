"""Deliberate faults at named points, deterministically: with these the tests show what a run survives.

    TIMETRIAL_FAULT="checkpoint.commit@20=kill"     at step 20, between writing a checkpoint and committing it
    TIMETRIAL_FAULT="step@7=nan:1"                  makes the loss of step 7 NaN, on rank 1 only

Points: step, checkpoint.write, checkpoint.commit.
Actions: kill (SIGKILL), term (SIGTERM), int (SIGINT), stop (SIGSTOP), error, nan.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass

from core.api.errors import UsageError
from core.api.types import Batch, Outputs, Position, Step

__all__ = ["strike"]

VARIABLE = "TIMETRIAL_FAULT"
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "stop": signal.SIGSTOP}


@dataclass(frozen=True)
class Fault:
    point: str
    step: int
    action: str
    rank: int | None

    def strike(self, point: str, step: int, rank: int) -> bool:
        """Acts if this is the point, the step and the rank; True asks the caller for a NaN."""
        if (point, step) != (self.point, self.step) or rank != (self.rank if self.rank is not None else rank):
            return False
        if self.action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self.action])
        elif self.action == "error":
            raise RuntimeError(f"injected fault at {point}, step {step}")
        return self.action == "nan"


def armed() -> Fault | None:
    """The fault that the environment asks for, if any."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    match = re.fullmatch(r"([a-z.]+)@(\d+)=(kill|term|int|stop|error|nan)(?::(\d+))?", text)
    if match is None:
        raise UsageError(f"{VARIABLE}={text} is not POINT@STEP=ACTION[:RANK]; see core/api/faults.py")
    point, step, action, rank = match.groups()
    return Fault(point, int(step), action, None if rank is None else int(rank))


def strike(point: str, step: int, rank: int) -> None:
    """Acts if a fault is armed for this point, step and rank."""
    fault = armed()
    if fault is not None:
        fault.strike(point, step, rank)


def in_step(step: Step, position: Position, rank: int) -> Step:
    """The training step itself, unless a fault is armed for it."""
    fault = armed()
    if fault is None or fault.point != "step":
        return step

    def faulty(batch: Batch) -> Outputs:
        outputs = step(batch)
        if fault.strike("step", position.step + 1, rank):
            outputs["loss"] = outputs["loss"] * float("nan")
        return outputs

    return faulty
