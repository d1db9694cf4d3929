"""An exponential moving average of the weights, which is what is evaluated."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class AverageWeights:
    """average = decay * average + (1 - decay) * weights, after each update. The first average is the first weights.

    The weights may be sharded over ranks: each rank averages its shard.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self._weights = [_local(parameter) for parameter in parameters]
        self._averages = [weight.clone() for weight in self._weights]
        self._decay = decay

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)  # pyright: ignore

    @contextmanager
    def in_place(self) -> Generator[None, None, None]:
        """While it lasts, the model's parameters hold the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)


def _local(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return getattr(parameter, "to_local", lambda: parameter)()
