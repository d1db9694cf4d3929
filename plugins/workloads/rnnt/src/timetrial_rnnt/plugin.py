"""The plugin as core sees it: what it is, and the hooks that build it. Imports without torch."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING

from core.api.config import require_root
from core.api.hooks import hookimpl
from core.api.types import Plugin, StepParts, WorkloadSpec
from timetrial_rnnt.config import RnntConfig

if TYPE_CHECKING:
    from core.api.preparation import Preparation
    from core.api.types import Evaluate, Forward, Plan, Quality, RunContext
    from timetrial_rnnt.workload import RnntWorkload


NEEDED = "make it with `python -m core.prepare workload=rnnt_mlperf source=LIBRISPEECH out=FOLDER`"

SPEC = WorkloadSpec(
    interface=2,
    summary="RNN-T speech recognition: spoken digits, or LibriSpeech as in MLPerf's closed rules",
    benchmark="rnnt",
    preparation=frozenset({"eval_folder", "max_duration", "sentencepiece_model", "tokens", "vocab_size"}),
)


class Rnnt(Plugin):
    """Speech recognition by an RNN transducer: `rnnt` and `rnnt_mlperf`."""

    spec = SPEC
    Config = RnntConfig
    config: RnntConfig

    @hookimpl
    def check(self, plan: Plan) -> None:
        require_root(plan.root.data, self.config.embedded_data, NEEDED)

    @hookimpl
    def make_workload(self, ctx: RunContext) -> RnntWorkload:
        from timetrial_rnnt.workload import RnntWorkload  # imports torch

        return RnntWorkload(SPEC, self.config, ctx)

    @hookimpl
    def prepare(self, preparation: Preparation) -> dict[str, int]:
        from timetrial_rnnt.prepare import run  # imports numpy and soundfile

        return run(preparation, self.config)

    @hookimpl(wrapper=True)
    def build_step(self, ctx: RunContext) -> Generator[None, StepParts, StepParts]:
        """The average of the weights follows each update."""
        parts = yield
        if not self.config.ema:
            return parts
        from timetrial_rnnt.ema import AverageWeights

        average = ctx.workload.average = AverageWeights(ctx.model.parameters(), self.config.ema)  # pyright: ignore[reportAttributeAccessIssue]

        def update() -> None:
            parts.update()
            average.update()

        return replace(parts, update=update)

    @hookimpl(wrapper=True)  # the workload is outermost: an opt may gather sharded weights inside
    def wrap_evaluate(self, ctx: RunContext) -> Generator[None, Evaluate, Evaluate]:
        """The average is evaluated."""
        evaluate = yield
        average = ctx.workload.average  # pyright: ignore[reportAttributeAccessIssue]

        def evaluate_average(infer: Forward) -> Quality:
            with average.in_place():
                return evaluate(infer)

        return evaluate_average if average else evaluate
