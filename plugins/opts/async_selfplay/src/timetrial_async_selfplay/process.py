"""The player's side: a process that builds the workload and the network, and plays each generation that it is asked for
with the weights that come with the request."""

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
    """What the player is told at its start. It plays the games of one rank of several."""

    plan: RunPlan
    run_dir: str
    device: str
    threads: int
    rank: int
    world_size: int


class _Apart:
    """A `Backend` that knows its place among the ranks but not the other ranks: they meet in the training processes."""

    def __init__(self, rank: int, world_size: int, device: Any) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device

    def all_gather(self, values: list[float]) -> list[list[float]]:
        raise RuntimeError("the self-play process has no part in exchanges between ranks")

    def broadcast(self, value: Any) -> Any:
        return self.all_gather([])

    def synchronize(self) -> None:
        import torch

        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def shutdown(self) -> None:
        """There is nothing to leave."""


def serve(order: Order, pipe: Connection) -> None:
    """Says that it is ready, then answers requests with `(kind of named tuple, figures, seconds, problem)`, followed by
    its tensors, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which then ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(variable, None)
    import torch

    try:
        player = _Player(order)
        pipe.send((None, {}, 0.0, None))
        for request in iter(_arriving(pipe).get, None):
            started = time.perf_counter()
            played = player.play(torch.load(io.BytesIO(request), weights_only=True))
            buffer = io.BytesIO()
            torch.save([tensor.cpu() for tensor in played], buffer)
            pipe.send((type(played), player.ctx.figures, time.perf_counter() - started, None))
            pipe.send_bytes(buffer.getbuffer())
    except Exception as error:
        pipe.send((None, {}, 0.0, " ".join(f"{type(error).__name__}: {error}".split())[:500]))


def _arriving(pipe: Connection) -> queue.SimpleQueue[bytes]:
    """Requests as they arrive. When the training process is gone this one ends at once, even in the midst of a game."""
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                arrived.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return arrived


class _Player:
    """The workload of a plan and its network, on this process's device. The workload's `generation` is what it has
    asked for as component "minigo.generation": it takes a generation's number and returns a named tuple of tensors."""

    def __init__(self, order: Order) -> None:
        import torch

        from core.api.types import RunContext
        from core.engine.worker import evaluator

        torch.set_num_threads(order.threads)
        config = order.plan.root()
        torch.set_deterministic_debug_mode("error" if config.deterministic else "default")
        self.ctx = RunContext(config=config, run_dir=Path(order.run_dir), seed=order.plan.seed)
        self.ctx.backend = _Apart(order.rank, order.world_size, torch.device(order.device))
        if self.ctx.device.type != "cpu":
            torch.accelerator.set_device_index(self.ctx.device.index or 0)
        evaluator(order.plan, self.ctx)  # fills in the model, and inference as the opts make it

    def play(self, request: dict[str, Any]) -> Any:
        """The generation, as the workload makes it, by the weights that come with the request."""
        self.ctx.model.load_state_dict(request["weights"])
        return self.ctx.workload.generation(request["generation"])  # pyright: ignore[reportAttributeAccessIssue]
