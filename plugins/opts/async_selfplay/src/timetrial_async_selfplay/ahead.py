"""The rank's side: weights go to the player, generations come back, and what was hidden behind steps is counted.

Which weights play which generation depends on its number alone: the first is played by the untrained network, and
generation g + 1 by the network as it is when training on generation g begins. These weights are part of a checkpoint,
so that a run that goes on has the generation that was under way played again, by the same ones.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from core.api.errors import TimetrialError
from core.api.sidecar import Reply
from core.api.types import RunContext
from timetrial_minigo.seams import Examples

Weights = dict[str, Tensor]


class Ahead:
    """The player beside this rank, which builds its network while this process continues."""

    def __init__(self, ctx: RunContext, device: str, threads: int | None) -> None:
        self._ctx = ctx
        self.generations, self.played_s, self.overlapped_s, self.waited_s, self.snapshot_s = 0, 0.0, 0.0, 0.0, 0.0
        self._next: tuple[int, Weights] | None = None  # which generation comes next, and who plays it
        self._begun_at: float | None = None  # when the player was asked for it
        serve = "timetrial_async_selfplay.serve:serve"
        threads = threads or torch.get_num_threads()
        self._player = ctx.start_sidecar("async_selfplay", serve, device, threads, alone=False)

    def wait_until_ready(self) -> None:
        """Before the clock starts; TimetrialError where the player cannot be built."""
        self._checked(self._player.ready())

    def generation(self, number: int) -> Examples:
        """This rank's share of a generation, and then the player is given the next one to play. TimetrialError where
        the player failed."""
        asked = time.perf_counter()
        if self._next is None:
            self._next = number, self._weights()
        assert self._next[0] == number
        if self._begun_at is None:
            self._begin()
        begun = self._begun_at
        reply = self._checked(self._player.answer())
        played, figures = reply.value
        self._begun_at = None
        self._ctx.figures.update(figures)
        self.generations += 1
        self.played_s += reply.seconds
        self.overlapped_s += max(0.0, min(reply.seconds, asked - begun))
        self.waited_s += time.perf_counter() - asked
        self._next = number + 1, self._weights()
        if number < min(self._ctx.workload.max_epochs, self._ctx.config.stop.epochs or number + 1):
            self._begin()
        return Examples(*played)

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
        """Asks the player for the next generation; training may then continue."""
        assert self._next is not None
        number, weights = self._next
        self._player.ask({"generation": number, "weights": weights})
        self._begun_at = time.perf_counter()

    def _checked(self, reply: Reply) -> Reply:
        if reply.problem:
            raise TimetrialError(f"the self-play process failed: {reply.problem}", rank=self._ctx.rank)
        return reply
