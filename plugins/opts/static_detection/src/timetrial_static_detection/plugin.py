"""The opt `static_detection`: a detector whose every tensor has a fixed shape, so that a step can be captured."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.config import checked
from core.hookspecs import hookimpl
from core.types import Evidence, OptSpec, Plugin, RunContext, Workload

if TYPE_CHECKING:
    from timetrial_static_detection.fixed import Fixed

COMPONENTS = ("proposals", "region_features", "detections")


@dataclass(kw_only=True)
class StaticDetectionConfig:
    """Settings of `opt.static_detection`."""

    rounds: int = checked(at_least=1)
    """Rounds of suppression: boxes that hang on a chain of so many others are settled."""
    candidates: int = checked(at_least=1)
    """Boxes of an image, over all classes, that its final detections are chosen from."""


class StaticDetection(Plugin):
    """Replaces the parts of Mask R-CNN whose shapes depend on the data."""

    spec = OptSpec(
        interface=1,
        summary="detection with fixed shapes and without host synchronisation",
        numerics="tolerance",
        components=frozenset(f"maskrcnn.{name}" for name in COMPONENTS),
    )
    Config = StaticDetectionConfig
    config: StaticDetectionConfig

    _fixed: Fixed | None = None

    @hookimpl(wrapper=True)
    def make_workload(self, ctx: RunContext) -> Generator[None, Workload, Workload]:
        workload = yield
        workload.spec = dataclasses.replace(workload.spec, capture="step", static_shapes=True)
        return workload

    @hookimpl(wrapper=True)
    def component(self, ctx: RunContext, name: str) -> Generator[None, Any, Any]:
        inner = yield
        kind, _, part = name.partition(".")
        if kind != "maskrcnn" or part not in COMPONENTS:
            return inner
        if self._fixed is None:
            from timetrial_static_detection.fixed import Fixed

            self._fixed = Fixed(self.config.rounds, self.config.candidates, ctx.device)
        return getattr(self._fixed, part)

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        fixed = self._fixed
        figures = fixed.figures() if fixed else {"images": 0, "unsettled": 0, "over_capacity": 0}
        images, unsettled, beyond = (figures[name] for name in ("images", "unsettled", "over_capacity"))
        return Evidence(
            plugin="static_detection",
            active=images > 0,
            summary=f"{images} images had their proposals chosen with fixed shapes; suppression was cut short in "
            f"{unsettled} of them, and {beyond} images to be evaluated had candidates beyond the capacity",
            figures=figures,
        )
