"""The opt `static_detection`: a detector whose every tensor has a fixed shape, so that a step can be captured."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.seams import Replacement
from core.api.types import Batch, Capture, Evidence, OptSpec, Plugin, Purpose, RunContext, Workload
from timetrial_maskrcnn.seams import DETECTIONS, MASKS, PROPOSALS, REGION_FEATURES

if TYPE_CHECKING:
    from timetrial_static_detection.fixed import Fixed


@dataclass(kw_only=True)
class StaticDetectionConfig:
    """Settings of `opt.static_detection`."""

    rounds: int = checked(at_least=1)
    """Rounds of suppression: boxes that hang on a chain of this many others are settled."""
    candidates: int = checked(at_least=1)
    """Boxes of an image, over all classes, that its final detections are chosen from."""
    objects: int | None = checked(at_least=1)
    """Objects of a training image that a batch has room for; None for as many as its fullest image has."""


class StaticDetection(Plugin):
    """Replaces the parts of Mask R-CNN whose shapes depend on the data."""

    spec = OptSpec(
        interface=2,
        summary="detection with fixed shapes and without host synchronisation",
        numerics="tolerance",
        replaces=frozenset({PROPOSALS, REGION_FEATURES, DETECTIONS, MASKS}),
    )
    Config = StaticDetectionConfig
    config: StaticDetectionConfig

    _fixed: Fixed | None = None

    @hookimpl(wrapper=True)
    def make_workload(self) -> Generator[None, Workload, Workload]:
        workload = yield
        workload.capture = Capture(step=True)
        return workload

    @hookimpl
    def replace(self, ctx: RunContext) -> list[Replacement[Any]]:
        fixed = self._of(ctx)
        return [
            PROPOSALS.by(lambda _: fixed.proposals),
            REGION_FEATURES.by(lambda _: fixed.region_features),
            DETECTIONS.by(lambda _: fixed.detections),
            MASKS.by(lambda _: fixed.masks),
        ]

    @hookimpl(wrapper=True)
    def transform(self, ctx: RunContext, purpose: Purpose) -> Generator[None, Iterable[Batch], Iterable[Batch]]:
        batches = yield
        if self.config.objects is None or purpose == "evaluate":  # images to be evaluated have no objects
            return batches
        return self._of(ctx).with_room(batches, self.config.objects)

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
