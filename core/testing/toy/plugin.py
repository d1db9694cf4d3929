"""The workload `toy`: what a workload plugin looks like when the model is small and the data is generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.types import Plugin, WorkloadSpec

if TYPE_CHECKING:
    from core.api.types import RunContext
    from core.testing.toy.workload import ToyWorkload


@dataclass(kw_only=True)
class ToyConfig:
    examples: int = checked(at_least=1)
    eval_examples: int = checked(at_least=1)
    features: int = checked(at_least=1)
    hidden: int = checked(at_least=1)
    classes: int = checked(at_least=2)
    global_batch_size: int = checked(at_least=1)
    learning_rate: float = checked(above=0)
    momentum: float = checked(at_least=0, at_most=1)
    max_epochs: int = checked(at_least=1)
    target: float = checked(at_least=0, at_most=1)
    eval_every: int = checked(at_least=1)
    dropout: float = checked(at_least=0, at_most=0.99)


class Toy(Plugin):
    spec = WorkloadSpec(
        interface=1,
        summary="a small network on generated points, for tests and first steps",
        benchmark="resnet",
        capture="step",
        static_shapes=True,
    )
    Config = ToyConfig

    @hookimpl
    def make_workload(self, ctx: RunContext) -> ToyWorkload:
        from core.testing.toy.workload import ToyWorkload

        return ToyWorkload(ctx, self.config)
