"""The player's side: it plays each generation that it is asked for, with the weights that come with the request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from core.api.types import RunContext
from timetrial_minigo.seams import Player


def serve(ctx: RunContext) -> Callable[[dict[str, Any]], tuple[list[Any], dict[str, Any]]]:
    """For `core.api.sidecar`. A request holds "weights" and the number of a "generation"; the answer is the tensors of
    its `Examples` and what the workload has counted."""
    player = cast(Player, ctx.workload)

    def play(request: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        ctx.model.load_state_dict(request["weights"])
        return list(player.generation(request["generation"])), ctx.figures

    return play
