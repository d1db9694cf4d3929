"""The training side: weights go to the player, generations come back, and what was hidden behind steps is counted.

Which weights play which generation depends on its number alone: the first is played by the untrained network, and
generation g + 1 by the network as it is when training on generation g begins. These weights are part of a checkpoint,
so that a run that goes on has the generation that was under way played again, by the same ones.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from core.api.errors import TimetrialError
from core.api.types import RunContext
from core.compose.plan import RunPlan
from timetrial_async_selfplay.process import Order, serve

Weights = dict[str, Tensor]


class Ahead:
    """The player process beside this rank."""

    def __init__(self, ctx: RunContext, device: str, threads: int | None) -> None:
        self._ctx = ctx
        self.generations, self.played_s, self.overlapped_s, self.waited_s, self.snapshot_s = 0, 0.0, 0.0, 0.0, 0.0
        self._next: tuple[int, Weights] | None = None  # which generation comes next, and who plays it
        self._begun_at: float | None = None  # when the player was asked for it
        self._ready = False
        self._start(device, threads or torch.get_num_threads())

    def _start(self, device: str, threads: int) -> None:
        """Starts the process, which builds the network while this one goes on."""
        ctx = self._ctx
        plan = RunPlan.load(ctx.run_dir / "resolved.yaml")
        mine = [p for p in plan.plugins if p.name != "async_selfplay" and _serves_a_player(p.load().spec)]
        order = Order(
            replace(plan, plugins=mine, seed=ctx.seed), str(ctx.run_dir), device, threads, ctx.rank, ctx.world_size
        )
        spawn = multiprocessing.get_context("spawn")  # not fork: this process has threads, and perhaps a GPU
        self._pipe, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(order, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        atexit.register(process.kill)

    def wait_until_ready(self) -> None:
        """Before the clock starts; TimetrialError where the player cannot be built."""
        if not self._ready:
            self._receive()
            self._ready = True

    def generation(self, number: int) -> Any:
        """This rank's share of a generation, and then the player is given the next one to play. TimetrialError where
        the player failed."""
        asked = time.perf_counter()
        if self._next is None:
            self._next = number, self._weights()
        assert self._next[0] == number
        if self._begun_at is None:
            self._begin()
        begun = self._begun_at
        played, figures, took_s = self._receive()
        self._begun_at = None
        self._ctx.figures.update(figures)
        self.generations += 1
        self.played_s += took_s
        self.overlapped_s += max(0.0, min(took_s, asked - begun))
        self.waited_s += time.perf_counter() - asked
        self._next = number + 1, self._weights()
        if number < min(self._ctx.workload.max_epochs, self._ctx.config.stop.epochs or number + 1):
            self._begin()
        return played

    def state_dict(self) -> dict[str, Any]:
        """Which generation comes next, and the weights that play it."""
        return {} if self._next is None else {"generation": self._next[0], "weights": self._next[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["generation"], state["weights"]
        if state["generation"] <= self._ctx.workload.max_epochs:
            self._begin()

    def _weights(self) -> Weights:
        """A copy of the network as it is now, on the host."""
        started = time.perf_counter()
        self._ctx.backend.synchronize()  # another thread may be asking, whose stream would not wait for the last update
        weights = {n: t.detach().to("cpu", copy=True) for n, t in self._ctx.model.state_dict().items()}
        self.snapshot_s += time.perf_counter() - started
        return weights

    def _begin(self) -> None:
        """Asks the player for the next generation; training may then go on."""
        assert self._next is not None
        self.wait_until_ready()
        number, weights = self._next
        buffer = io.BytesIO()
        torch.save({"generation": number, "weights": weights}, buffer)
        with contextlib.suppress(OSError):  # a player that is gone is noticed when it is asked
            self._pipe.send_bytes(buffer.getbuffer())
        self._begun_at = time.perf_counter()

    def _receive(self) -> tuple[Any, dict[str, Any], float]:
        """The player's next word: a generation, what it counted, and the seconds that it took."""
        try:
            kind, figures, took_s, problem = self._pipe.recv()
            tensors = torch.load(io.BytesIO(self._pipe.recv_bytes()), weights_only=True) if kind else []
        except (EOFError, OSError):
            problem = "it ended without a word, perhaps for want of memory"
        if problem:
            raise TimetrialError(f"the self-play process failed: {problem}", rank=self._ctx.rank)
        return kind(*tensors) if kind else None, figures, took_s


def _serves_a_player(spec: Any) -> bool:
    """Whether a plugin has a part in inference on one rank: not what exchanges between ranks, nor what evaluates."""
    return "multi_rank" not in spec.requires and "evaluate" not in getattr(spec, "components", ())
