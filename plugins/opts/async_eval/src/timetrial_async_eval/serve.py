"""The evaluator's side: it evaluates the weights that it is sent, over the whole evaluation set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core.api.types import RunContext


def serve(ctx: RunContext) -> Callable[[dict[str, Any]], dict[str, float]]:
    """For `core.api.sidecar`. A request holds the states of "model" and "workload"; the answer is the quality."""

    def evaluate(states: dict[str, Any]) -> dict[str, float]:
        ctx.model.load_state_dict(states["model"])
        ctx.workload.load_state_dict(states["workload"])
        quality = ctx.evaluate()
        assert isinstance(quality, dict)  # nothing evaluates beside a sidecar
        return {metric: float(value) for metric, value in quality.items()}

    return evaluate
