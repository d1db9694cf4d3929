"""The plugin as core sees it: what it is, and the hook that builds it. Imports without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.api.errors import NotOfferedError
from core.api.hooks import hookimpl
from core.api.types import Plan, Plugin, WorkloadSpec
from timetrial_minigo.config import MiniGoConfig

if TYPE_CHECKING:
    from core.api.types import RunContext
    from timetrial_minigo.workload import MiniGoWorkload


SPEC = WorkloadSpec(
    interface=2,
    summary="Go by self-play: 5x5 against open_spiel's MCTS, or 19x19 as in MLPerf's closed rules",
    benchmark="minigo",
    batch_statistics=True,
)


class MiniGo(Plugin):
    """Go by reinforcement learning: `minigo` and `minigo_mlperf`."""

    spec = SPEC
    Config = MiniGoConfig
    config: MiniGoConfig

    @hookimpl
    def check(self, plan: Plan) -> None:
        shared = [d.name for d in plan.dimensions if d.name != "data"]
        if shared:
            why = "ranks that share a model must call it together, and in games each goes at its own pace"
            raise NotOfferedError(f"workload 'minigo' has no place for the mesh dimension {', '.join(shared)}: {why}")

    @hookimpl
    def make_workload(self, ctx: RunContext) -> MiniGoWorkload:
        from timetrial_minigo.workload import MiniGoWorkload  # imports torch

        return MiniGoWorkload(SPEC, self.config, ctx)
