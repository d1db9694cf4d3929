"""Everything between the plan and the loop: the model, its step and its evaluation, as the opts make them.

The order is fixed: workload -> model -> distribution -> optimizer -> layout -> step -> evaluation -> warm-up. At each
place core has the plainest thing, and the opts wrap it.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from core.api.errors import NotOfferedError, PluginError
from core.api.generators import generator_states, set_generator_states
from core.api.hooks import hookimpl
from core.api.seams import EVALUATE, FEED, INFER, LOSS, Replacement, Seam
from core.api.tree import map_tensors
from core.api.types import Batch, Layout, OptSpec, Outputs, Purpose, Quality, RunContext, Step, StepParts
from core.compose.manager import plugin_manager
from core.compose.plan import RunPlan


class Baseline:
    """Core's own implementations: the innermost layer of every onion, which adds no trick."""

    @hookimpl
    def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    @hookimpl
    def distribute(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    @hookimpl
    def make_optimizer(self, ctx: RunContext, model: torch.nn.Module) -> torch.optim.Optimizer:
        return ctx.workload.build_optimizer(model)

    @hookimpl
    def lay_out(self, layout: Layout) -> Layout:
        return layout

    @hookimpl
    def transform(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        return batches

    @hookimpl
    def build_step(self, parts: StepParts) -> StepParts:
        return parts

    @hookimpl
    def wrap_step(self, step: Any) -> Any:
        return step

    @hookimpl
    def wrap_evaluate(self, evaluate: Any) -> Any:
        return evaluate


class WholeLayout:
    """The layout of a model that each rank holds whole."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def local_parameters(self) -> Iterable[Tensor]:
        return self.model.parameters()

    def model_state(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(state)

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class Seams:
    """The seams of one process: what the opts make of each, and which were offered."""

    def __init__(self, ctx: RunContext, plan: RunPlan, hooks: Any) -> None:
        self._specs = {p.name: spec for p in plan.plugins if isinstance(spec := p.load().spec, OptSpec)}
        self._workload = plan.workload
        self._offered: set[str] = set()
        self._replacements: dict[str, list[Replacement[Any]]] = {}
        declared = {seam for spec in self._specs.values() for seam in spec.replaces}
        collected: list[list[Replacement[Any]]] = hooks.replace(ctx=ctx)
        for replacement in itertools.chain.from_iterable(reversed(collected)):  # pluggy gives the outermost first
            if replacement.seam not in declared:
                raise PluginError(f"seam '{replacement.seam.name}' is replaced by an opt whose spec does not say so")
            self._replacements.setdefault(replacement.seam.name, []).append(replacement)

    def offer(self, seam: Seam[Any], value: Any) -> Any:
        """What the opts make of `value`, from the innermost to the outermost."""
        self._offered.add(seam.name)
        for replacement in self._replacements.get(seam.name, ()):
            value = replacement.make(value)
        return value

    def refuse_idle_opts(self) -> None:
        """NotOfferedError for an opt none of whose seams was offered: it would do nothing."""
        for name, spec in self._specs.items():
            names = sorted(seam.name for seam in spec.replaces)
            if names and not self._offered.intersection(names):
                what = f"opt '{name}' acts on {', '.join(names)}, which nothing here offers: not workload"
                raise NotOfferedError(f"{what} '{self._workload}', and no other opt; leave it out")


def build_for_training(ctx: RunContext, plan: RunPlan, hooks: Any) -> Step:
    """Fills in `ctx` and warms up. Returns the training step."""
    prepared, seams = _build_model(ctx, plan, hooks)
    ctx.distributed_model = hooks.distribute(ctx=ctx, model=prepared)
    ctx.optimizer = hooks.make_optimizer(ctx=ctx, model=ctx.model)
    ctx.layout = hooks.lay_out(ctx=ctx, layout=WholeLayout(ctx.model, ctx.optimizer))
    step = _build_step(ctx, hooks)
    _build_evaluation(ctx, hooks, prepared)
    seams.refuse_idle_opts()
    if ctx.config.prewarm_steps:
        _warm_up(ctx)
    return step


def build_for_inference(ctx: RunContext, plan: RunPlan) -> None:
    """For a sidecar: fills in `ctx`, whose backend and mesh are given, but for what only trains."""
    hooks = plugin_manager(plan.plugins, plan.config, [Baseline()]).hook
    prepared, _ = _build_model(ctx, plan, hooks)
    _build_evaluation(ctx, hooks, prepared)


def batches(ctx: RunContext, epoch: int, first_batch: int) -> Iterator[Batch]:
    """The rest of an epoch, on the device: the one path of a batch."""
    workload = ctx.workload
    synthetic = itertools.repeat(_first_example(ctx)) if ctx.synthetic else None
    return ctx.to_device(synthetic or workload.batches(epoch, first_batch), "train")


def _first_example(ctx: RunContext) -> Batch:
    return next(iter(ctx.workload.example_batches()))


def _build_model(ctx: RunContext, plan: RunPlan, hooks: Any) -> tuple[torch.nn.Module, Seams]:
    """The workload and its model, as `prepare_model` leaves it."""
    seams = Seams(ctx, plan, hooks)
    ctx.offers = seams.offer
    ctx.workload = hooks.make_workload(ctx=ctx)
    if not ctx.synthetic:
        ctx.workload.check_data()
    moved = functools.partial(map_tensors, operator.methodcaller("to", ctx.device))
    on_host = ctx.device.type == "cpu"  # where batches are: a step need not look through them

    def feed(stream: Iterable[Batch], purpose: Purpose) -> Iterator[Batch]:
        return iter(stream) if on_host else map(moved, stream)

    offered_feed = ctx.offer(FEED, feed)

    def to_device(stream: Iterable[Batch], purpose: Purpose) -> Iterator[Batch]:
        return offered_feed(hooks.transform(ctx=ctx, batches=stream, purpose=purpose), purpose)

    ctx.to_device = to_device

    def feed_evaluation(data: Iterable[Any]) -> Iterator[Any]:
        return (batch.data for batch in to_device((Batch(one, 0) for one in data), "evaluate"))

    ctx.feed = feed_evaluation
    ctx.model = ctx.workload.build_model().to(ctx.device)
    return hooks.prepare_model(ctx=ctx, model=ctx.model), seams


def _build_step(ctx: RunContext, hooks: Any) -> Step:
    """The whole training step, as the opts made it; `ctx.parts` are its halves."""
    model, optimizer, loss_function = ctx.distributed_model, ctx.optimizer, ctx.offer(LOSS, ctx.workload.loss)

    def forward_backward(batch: Batch) -> Outputs:
        outputs = loss_function(model, batch.data)
        loss = outputs["loss"] if batch.weight == 1.0 else outputs["loss"] * batch.weight
        loss.backward()
        return {**outputs, "loss": loss.detach()}

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    ctx.parts = parts = hooks.build_step(ctx=ctx, parts=StepParts(forward_backward, update))

    def step(batch: Batch) -> Outputs:
        outputs = parts.forward_backward(batch)
        parts.update()
        return outputs

    return hooks.wrap_step(ctx=ctx, step=step, purpose="train")


def _build_evaluation(ctx: RunContext, hooks: Any, prepared: torch.nn.Module) -> None:
    """Fills in `ctx.infer` and `ctx.evaluate`."""
    infer = functools.partial(ctx.offer(INFER, ctx.workload.infer), prepared)
    ctx.infer = hooks.wrap_step(ctx=ctx, step=infer, purpose="infer")
    innermost = ctx.workload.evaluate if ctx.synthetic else ctx.offer(EVALUATE, ctx.workload.evaluate)
    wrapped = hooks.wrap_evaluate(ctx=ctx, evaluate=innermost)

    def evaluate() -> Quality:
        return _without_gradient(ctx, wrapped, ctx.infer)

    ctx.evaluate = evaluate


def _warm_up(ctx: RunContext) -> None:
    """Runs the parts of a step on an example before the clock, as the rules allow, and leaves no trace of it."""
    before = {name: tensor.clone() for name, tensor in ctx.model.state_dict().items()}
    generators = generator_states(ctx.device)
    (batch,) = ctx.to_device([_first_example(ctx)], "warm_up")
    ctx.model.train()
    for _ in range(ctx.config.prewarm_steps):
        ctx.parts.forward_backward(batch)
        ctx.optimizer.zero_grad()
    _without_gradient(ctx, ctx.infer, batch.data)
    _put_back(ctx.model, before)
    set_generator_states(ctx.device, generators)
    ctx.backend.synchronize()


@torch.no_grad()
def _put_back(model: torch.nn.Module, before: Mapping[str, Tensor]) -> None:
    """In place, and each rank its own part: a layout would take whole tensors."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(before[name])


def _without_gradient(ctx: RunContext, function: Callable[[Any], Any], argument: Any) -> Any:
    """`function(argument)` with the model in evaluation mode."""
    ctx.model.eval()
    with torch.no_grad():
        result = function(argument)
    ctx.model.train()
    return result
