"""The evaluator's side: a process that builds the workload and the model, and evaluates whatever weights it is sent."""

from __future__ import annotations

import io
import os
import queue
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from core.compose.plan import RunPlan


@dataclass(frozen=True)
class Order:
    """What the evaluator is told at its start."""

    plan: RunPlan
    run_dir: str
    device: str
    threads: int


class _Alone:
    """A `Backend` of one rank: the evaluator sees the whole evaluation set."""

    rank, world_size = 0, 1

    def __init__(self, device: Any) -> None:
        self.device = device

    def all_gather(self, values: list[float]) -> list[list[float]]:
        return [[float(value) for value in values]]

    def broadcast(self, value: Any) -> Any:
        return value

    def synchronize(self) -> None:
        import torch

        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def shutdown(self) -> None:
        """There is nothing to leave."""


def serve(order: Order, pipe: Connection) -> None:
    """Says that it is ready, then answers weights with `(quality, problem, seconds)` until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which then ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(variable, None)
    import torch

    try:
        evaluation = _Evaluation(order)
        pipe.send(({}, None, 0.0))
        for weights in iter(_arriving(pipe).get, None):
            started = time.perf_counter()
            quality = evaluation(torch.load(io.BytesIO(weights), weights_only=True, map_location="cpu"))
            pipe.send((quality, None, time.perf_counter() - started))
    except Exception as error:
        pipe.send(({}, " ".join(f"{type(error).__name__}: {error}".split())[:500], 0.0))


def _arriving(pipe: Connection) -> queue.SimpleQueue[bytes]:
    """Weights as they arrive. When the training process is gone this one ends at once, even in an evaluation."""
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                arrived.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return arrived


class _Evaluation:
    """The workload of a plan, its model and its evaluation, on this process's device."""

    def __init__(self, order: Order) -> None:
        import torch

        from core.api.types import RunContext
        from core.engine.worker import evaluator

        torch.set_num_threads(order.threads)
        config = order.plan.root()
        torch.set_deterministic_debug_mode("error" if config.deterministic else "default")
        self.ctx = RunContext(config=config, run_dir=Path(order.run_dir), seed=order.plan.seed)
        self.ctx.backend = _Alone(torch.device(order.device))
        if self.ctx.device.type != "cpu":
            torch.accelerator.set_device_index(self.ctx.device.index or 0)
        self.evaluate = evaluator(order.plan, self.ctx)

    def __call__(self, states: dict[str, Any]) -> dict[str, float]:
        self.ctx.model.load_state_dict(states["model"])
        self.ctx.workload.load_state_dict(states["workload"])
        quality = self.evaluate()
        assert isinstance(quality, dict)
        return quality
