"""The workload `toy`: what a workload plugin looks like when the model is small and the data is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.api.hooks import hookimpl
from core.api.types import Plugin, WorkloadSpec
from core.testing.toy.config import ToyConfig

if TYPE_CHECKING:
    from core.api.types import RunContext
    from core.testing.toy.workload import ToyWorkload


SPEC = WorkloadSpec(
    interface=2, summary="a small network on generated points, for tests and first steps", benchmark="resnet"
)


class Toy(Plugin):
    """Where a new workload begins."""

    spec = SPEC
    Config = ToyConfig
    config: ToyConfig

    @hookimpl
    def make_workload(self, ctx: RunContext) -> ToyWorkload:
        from core.testing.toy.workload import ToyWorkload

        return ToyWorkload(SPEC, self.config, ctx)
