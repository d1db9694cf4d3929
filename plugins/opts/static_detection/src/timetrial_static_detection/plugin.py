"""The opt `static_detection`: a detector whose every tensor has a fixed shape, so that a step can be captured."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.types import Batch, Evidence, OptSpec, Plugin, RunContext, Workload

if TYPE_CHECKING:
    from timetrial_static_detection.fixed import Fixed

COMPONENTS = ("proposals", "region_features", "detections", "masks")


@dataclass(kw_only=True)
class StaticDetectionConfig:
    """Settings of `opt.static_detection`."""

    rounds: int = checked(at_least=1)
    """Rounds of suppression: boxes that hang on a chain of so many others are settled."""
    candidates: int = checked(at_least=1)
    """Boxes of an image, over all classes, that its final detections are chosen from."""
    objects: int | None = checked(at_least=1)
    """Objects of a training image that a batch has room for; None for as many as its fullest image has."""


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

    # Innermost, wherever this opt lies: others decide by the spec what they can do.
    @hookimpl(wrapper=True, trylast=True)
    def make_workload(self) -> Generator[None, Workload, Workload]:
        workload = yield
        workload.spec = dataclasses.replace(workload.spec, capture="step")
        return workload

    @hookimpl(wrapper=True)
    def component(self, ctx: RunContext, name: str) -> Generator[None, Any, Any]:
        inner = yield
        kind, _, part = name.partition(".")
        return getattr(self._of(ctx), part) if kind == "maskrcnn" and part in COMPONENTS else inner

    @hookimpl(wrapper=True)
    def wrap_batches(self, ctx: RunContext) -> Generator[None, Iterable[Batch], Iterable[Batch]]:
        inner = yield
        return self._of(ctx).with_room(inner, self.config.objects) if self.config.objects else inner

    def _of(self, ctx: RunContext) -> Fixed:
        if self._fixed is None:
            from timetrial_static_detection.fixed import Fixed

            self._fixed = Fixed(self.config.rounds, self.config.candidates, ctx.device)
        return self._fixed

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        figures = self._of(ctx).figures()
        return Evidence(
            plugin="static_detection",
            active=figures["images"] > 0,
            summary=f"{figures['images']} images had their proposals chosen with fixed shapes, and {figures['masks']} "
            f"masks were encoded without their image; suppression was cut short {figures['unsettled']} times, "
            f"{figures['over_candidates']} images had more candidates and {figures['over_objects']} more objects than "
            "there was room for",
            figures={**figures, "rounds": self.config.rounds, "candidates": self.config.candidates},
        )
