"""The opt `stream_overlap`: copies, gradient exchange and updates that run while the model computes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from core.api.config import checked
from core.api.errors import UsageError
from core.api.hooks import hookimpl
from core.api.seams import FEED, GRADIENT_BUCKETS, GRADIENT_EXCHANGE, Replacement
from core.api.types import (
    Batch,
    Evaluate,
    Evidence,
    Forward,
    OptSpec,
    Outputs,
    Plan,
    Plugin,
    Purpose,
    Quality,
    RunContext,
    StepParts,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from timetrial_stream_overlap.evidence import Part
    from timetrial_stream_overlap.feed import Counts, PlainFeed
    from timetrial_stream_overlap.overlap import Hidden
    from timetrial_stream_overlap.updates import BackwardUpdates
    from timetrial_stream_overlap.window import Window

Exchange = tuple[Any, Callable[..., Any]] | None

MIB = 2**20
OFF = "switched off"

BUCKETS = 16
"""Buckets that the gradients are split into, where `bucket_cap_mib` leaves it open. The exchange of the last one cannot
be hidden: a sixteenth of all."""

SMALLEST_BUCKET_MIB, LARGEST_BUCKET_MIB = 0.0625, 25.0
"""Below, the fixed cost of a collective outweighs what an earlier start hides; 25 MiB is torch's own default."""


@dataclass(kw_only=True)
class StreamOverlapConfig:
    """Settings of `opt.stream_overlap`."""

    RENAMED: ClassVar[Mapping[str, str]] = {"bucket_cap_mb": "bucket_cap_mib"}

    copies: bool
    """A thread prepares the next training batches and moves them to the device."""
    evaluation: bool
    """The same for evaluation batches."""
    gradients: bool
    """Smaller buckets, and gradients that are views of them."""
    optimizer: bool
    """A bucket's parameters are updated as soon as their gradients are final."""
    prefetch: int = checked(at_least=1)
    """Batches that may be ready or under way ahead of the step."""
    bucket_cap_mib: float | None = checked(above=0)
    """MiB of gradients in a bucket; null: a sixteenth of all, within bounds."""
    profile_after: int = checked(at_least=0)
    """Steps before those that are profiled for the evidence."""
    profile_steps: int = checked(at_least=1)
    """Steps that are profiled."""
    trace: bool
    """Leave the trace of the profiled steps in the run folder."""


class StreamOverlap(Plugin):
    """Hides input, gradient exchange and updates behind compute."""

    spec = OptSpec(
        interface=2,
        summary="copies, gradient exchange and updates while the model computes",
        numerics="tolerance",
        # It acts on what the others make of a step and of the exchange.
        wraps=frozenset({"grad_accumulation", "gradient_compression", "sharp"}),
        replaces=frozenset({FEED, GRADIENT_BUCKETS, GRADIENT_EXCHANGE}),
    )
    Config = StreamOverlapConfig
    config: StreamOverlapConfig

    _window: Window
    _fed: dict[Purpose, Counts]
    _training = False
    _updates: BackwardUpdates | None = None
    _without_updates = ""
    """Why nothing is updated in the backward pass."""
    _hooked = False
    """Whether updates follow an exchange of another opt's."""

    @hookimpl
    def check(self, plan: Plan) -> None:
        c = self.config
        if not (c.copies or c.evaluation or c.gradients or c.optimizer):
            raise UsageError("all parts of opt 'stream_overlap' are switched off: leave it out")

    @hookimpl
    def replace(self, ctx: RunContext) -> list[Replacement[Any]]:
        return [
            FEED.by(partial(self._feed, ctx)),
            GRADIENT_BUCKETS.by(partial(self._small_buckets, ctx)),
            GRADIENT_EXCHANGE.by(partial(self._updated_behind, ctx)),
        ]

    # ---------------------------------------------------------------------------------------------------- input

    def _feed(self, ctx: RunContext, plain: PlainFeed) -> PlainFeed:
        from timetrial_stream_overlap.feed import Counts, Feed
        from timetrial_stream_overlap.window import Window

        ahead = Feed(plain, ctx.device, self.config.prefetch)
        self._window = window = Window(self.config.profile_after, self.config.profile_steps)
        self._fed = {purpose: Counts() for purpose in get_args(Purpose)}

        def fed(batches: Iterable[Batch], purpose: Purpose) -> Iterator[Batch]:
            wanted = self.config.evaluation if purpose == "evaluate" else self.config.copies
            return ahead(batches, purpose, self._fed[purpose]) if wanted else plain(batches, purpose)

        def training(batches: Iterable[Batch]) -> Iterator[Batch]:
            for batch in fed(batches, "train"):
                if self._training:
                    window.advance()
                yield batch

        def feed(batches: Iterable[Batch], purpose: Purpose) -> Iterator[Batch]:
            return training(batches) if purpose == "train" else fed(batches, purpose)

        return feed

    @hookimpl(wrapper=True)
    def wrap_evaluate(self) -> Generator[None, Evaluate, Evaluate]:
        evaluate = yield

        def run(infer: Forward) -> Quality:
            self._window.close()
            return evaluate(infer)

        return run

    # ------------------------------------------------------------------------------------- gradients and updates

    def _bucket_mib(self, model: nn.Module) -> float:
        if self.config.bucket_cap_mib is not None:
            return self.config.bucket_cap_mib
        share = sum(p.nbytes for p in model.parameters() if p.requires_grad) / BUCKETS / MIB
        return min(max(share, SMALLEST_BUCKET_MIB), LARGEST_BUCKET_MIB)

    def _small_buckets(self, ctx: RunContext, inner: dict[str, Any]) -> dict[str, Any]:
        if not self.config.gradients:
            return inner
        return {**inner, "bucket_cap_mb": self._bucket_mib(ctx.model), "gradient_as_bucket_view": True}

    def _updated_behind(self, ctx: RunContext, inner: Exchange) -> Exchange:
        from timetrial_stream_overlap.updates import BackwardUpdates

        if not self.config.optimizer or inner is None:
            return inner  # `build_step` adds an exchange if there will be updates to make
        self._updates = BackwardUpdates(ctx.device)
        state, hook = inner
        self._hooked = True
        return state, self._updates.after(hook)

    @hookimpl(wrapper=True)
    def build_step(self, ctx: RunContext, parts: StepParts) -> Generator[None, StepParts, StepParts]:
        from timetrial_stream_overlap.updates import BackwardUpdates, average, obstacle

        inner = yield
        updates, ddp = self._updates or BackwardUpdates(ctx.device), _ddp(ctx.distributed_model)
        if not self.config.optimizer:
            self._without_updates = OFF
        elif ddp is None and ctx.world_size > 1:
            self._without_updates = "no DistributedDataParallel exchanges the gradients"
        elif ddp is None and ctx.device.type == "cpu":
            self._without_updates = "one rank on a CPU has nothing to run them beside"
        elif ddp is None and inner.micro_batches > 1:
            self._without_updates = "one rank cannot tell the last of several backward passes in a step"
        else:
            self._without_updates = obstacle(ctx.optimizer, parts, inner) or ""
        if self._without_updates:
            self._updates = None
            return inner
        self._updates = updates
        updates.bind(ctx.optimizer)
        if ddp is None:
            updates.watch(int(self._bucket_mib(ctx.model) * MIB))
        elif not self._hooked:
            ddp.register_comm_hook(ddp.process_group, updates.after(average))
        return replace(inner, update=updates.finish)

    @hookimpl(wrapper=True)
    def wrap_step(self, purpose: Literal["train", "infer"]) -> Generator[None, Any, Any]:
        step = yield
        if purpose == "infer":
            return step

        def train(batch: Batch) -> Outputs:
            self._training = True  # the warm-up, which must leave no trace, runs only a part of a step
            if self._updates is not None:
                self._updates.armed = True
            return step(batch)

        return train

    # -------------------------------------------------------------------------------------------------- evidence

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        from timetrial_stream_overlap.evidence import evidence

        if not self._training:
            return Evidence(plugin="stream_overlap", active=False, summary="no training step has run yet")
        self._window.close()
        # Smaller buckets are summed in another order by three ranks or more, and cut compiled graphs elsewhere.
        other_sums = self.config.gradients and _ddp(ctx.distributed_model) is not None
        numerics = None if other_sums else "bitwise"
        return evidence(self._parts(ctx), self._window.steps, self._window.problem, numerics)

    def _parts(self, ctx: RunContext) -> list[Part]:
        from timetrial_stream_overlap.overlap import hidden, spans, unnoticed

        keep = ctx.run_dir / f"stream_overlap_rank{ctx.rank}.trace.json" if self.config.trace else None
        seen = spans(*self._window.trace(keep))
        return [
            *self._input(ctx, unnoticed(seen.preparation, seen.waiting), hidden(seen.copies, seen.compute)),
            self._communication(ctx, hidden(seen.communication, seen.compute)),
            self._backward_updates(ctx, hidden(seen.updates, seen.compute)),
        ]

    def _input(self, ctx: RunContext, prepared: Hidden, copied: Hidden) -> list[Part]:
        from timetrial_stream_overlap.evidence import Part

        train, evaluation = self._fed["train"], self._fed["evaluate"]
        parts = [Part("input", OFF)]
        if self.config.copies:
            parts = [Part("input", train.words, train.ready > 0, prepared)]
        if ctx.device.type == "cpu":
            parts.append(Part("copies", "a CPU reads batches where they are"))
        elif self.config.copies:
            parts.append(Part("copies", "from page-locked memory, on a separate stream", copied.busy > 0, copied))
        if not self.config.evaluation:
            return [*parts, Part("evaluation", OFF)]
        return [*parts, Part("evaluation", evaluation.words, evaluation.ready > 0)]

    def _communication(self, ctx: RunContext, exchanged: Hidden) -> Part:
        from timetrial_stream_overlap.evidence import Part

        ddp = _ddp(ctx.distributed_model)
        if ddp is None and ctx.world_size == 1:
            return Part("communication", "one rank exchanges nothing")
        if ddp is None:
            return Part("communication", "not by DistributedDataParallel, so left as it is", False, exchanged)
        words = f"gradients in buckets of {ddp.bucket_bytes_cap / MIB:.3g} MiB"
        if ddp.gradient_as_bucket_view:
            words += ", which they are views of"
        return Part("communication", words, self.config.gradients, exchanged)

    def _backward_updates(self, ctx: RunContext, updated: Hidden) -> Part:
        from timetrial_stream_overlap.evidence import Part

        updates = self._updates
        if updates is None:
            return Part("updates", f"not in the backward pass: {self._without_updates}")
        words = f"{updates.buckets / max(1, updates.steps):.3g} a step in the backward pass, one for each bucket"
        if updates.late:
            words += f", {updates.late} parameters after it"
        return Part("updates", words, updates.buckets > 0, updated)


def _ddp(model: nn.Module) -> DistributedDataParallel | None:
    from torch.nn.parallel import DistributedDataParallel

    return next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
