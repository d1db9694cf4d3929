"""The plugin as core sees it: what it is, and the hook that builds it. Imports without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.api.errors import NotOfferedError, UsageError
from core.api.hooks import hookimpl
from core.api.types import Plan, Plugin, WorkloadSpec
from timetrial_minigo.config import MiniGoConfig, refuse_contradictions

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
        refuse_contradictions(self.config)
        played = plan.root.data.source != "synthetic"
        if played and self.config.opponent == "checkpoint" and not self.config.target_checkpoint:
            what = "workload.target_checkpoint is not set, and workload.opponent=checkpoint plays against it"
            raise UsageError(f"{what}: give the folder of a finished run of this workload, or a safetensors file")
        shared = [d.name for d in plan.dimensions if d.name != "data"]
        if shared:
            why = "ranks that share a model must call it together, and in games each goes at its own pace"
            what = f"workload 'minigo' has no place for the mesh dimension {', '.join(shared)}"
            raise NotOfferedError(f"{what}: {why}; leave out the opt that adds it")

    @hookimpl
    def make_workload(self, ctx: RunContext) -> MiniGoWorkload:
        from timetrial_minigo.workload import MiniGoWorkload  # imports torch

        return MiniGoWorkload(SPEC, self.config, ctx)
