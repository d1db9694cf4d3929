"""The other end of `core.api.sidecar`: the process that builds a plan's workload and model, and answers requests."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.api.mesh import DATA, Dimension, Mesh, arrange
from core.api.sidecar import Sidecar, packed, unpacked
from core.compose.plan import RunPlan

if TYPE_CHECKING:
    import torch

    from core.api.types import RunContext


@dataclass(frozen=True)
class _Order:
    """What the process is told at its start."""

    plan: RunPlan
    run_dir: Path
    seed: int
    name: str
    serve: str
    device: str
    threads: int
    dimensions: tuple[Dimension, ...]
    rank: int


def start(
    ctx: RunContext, plan: RunPlan, name: str, serve: str, device: str, threads: int, alone: bool = True
) -> Sidecar:
    """Starts a sidecar of the opt `name` on `device`, with that number of CPU `threads`. `alone` makes it the only data
    rank, as one that evaluates has to be; else it has this rank's place among the data ranks, but no connection to
    them."""
    place = Mesh(arrange([], 1)) if alone else Mesh(arrange([DATA], ctx.data_size), ctx.data_rank)
    order = _Order(plan, ctx.run_dir, ctx.seed, name, serve, device, threads, place.dimensions, place.rank)
    spawn = multiprocessing.get_context("spawn")  # not fork: this process has threads, and perhaps a GPU
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_main, args=(order, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return Sidecar(process, ours)  # pyright: ignore[reportArgumentType]  # on Windows the class has another name


class _Apart:
    """A `Backend` that has a place among the ranks, but reaches none of them."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.rank, self.world_size, self.device = mesh.rank, mesh.world_size, device

    def all_gather(self, values: list[float]) -> list[list[float]]:
        if self.world_size > 1:
            raise RuntimeError("a sidecar cannot take part in exchanges between ranks")
        return [[float(value) for value in values]]

    def broadcast(self, value: Any) -> Any:
        self.all_gather([])
        return value

    def synchronize(self) -> None:
        import torch

        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def shutdown(self) -> None:
        """There is nothing to leave."""


def _main(order: _Order, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the rank, which then ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(variable, None)
    requests = _arriving(pipe)
    try:
        module, _, function = order.serve.partition(":")
        answer = getattr(importlib.import_module(module), function)(_build(order))
        _reply(pipe, None)
        while True:
            request = unpacked(requests.get())
            started = time.perf_counter()
            value = answer(request)
            _reply(pipe, value, time.perf_counter() - started)
    except Exception as error:
        _reply(pipe, None, problem=" ".join(f"{type(error).__name__}: {error}".split())[:500])


def _reply(pipe: Connection, value: Any, seconds: float = 0.0, problem: str = "") -> None:
    with contextlib.suppress(BrokenPipeError):  # the rank is gone: `_arriving` ends this process
        pipe.send_bytes(packed((value, seconds, problem)))


def _arriving(pipe: Connection) -> queue.SimpleQueue[bytes]:
    """Requests as they arrive. When the rank is gone this process ends at once, even in the middle of an answer."""
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                arrived.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return arrived


def _build(order: _Order) -> RunContext:
    """The workload, its model and inference, on this process's device."""
    import torch

    from core.api.types import RunContext
    from core.engine.build import build_for_inference

    torch.set_num_threads(order.threads)
    config = order.plan.root
    torch.set_deterministic_debug_mode("error" if config.deterministic else "default")
    ctx = RunContext(config=config, run_dir=order.run_dir, seed=order.seed, sidecar=order.name)
    ctx.mesh = Mesh(order.dimensions, order.rank)
    ctx.backend = _Apart(ctx.mesh, torch.device(order.device))
    if ctx.device.type != "cpu":
        torch.accelerator.set_device_index(ctx.device.index or 0)
    build_for_inference(ctx, order.plan)
    return ctx
