"""THE public interface: every hook that a plugin may implement, in the order in which a run calls them.

Mark an implementation with `core.hookimpl`. An *onion* hook is implemented as a wrapper around what lies inside it:

    @hookimpl(wrapper=True)
    def prepare_model(self, ctx, model):
        model = yield               # what the opts inside this one, and core, made of it
        return model.to(memory_format=torch.channels_last)

Hooks build the step; none is called inside one. An implementation may leave out arguments, but not rename them.
"""

# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import nn

    from core.api.config import RunConfig
    from core.api.types import Backend, Batch, Evaluate, Evidence, Plan, Position, RunContext, StepParts, Workload
    from core.prepare import Preparation

PROJECT = "timetrial"
hookimpl = pluggy.HookimplMarker(PROJECT)
COLLECTED = ("environment", "check", "on_block", "on_eval", "on_log", "verify")
"""Hooks that every plugin is asked; of the others the first plugin that has one gives the result."""


class Hooks:
    """Every hook. Kinds of plugin that usually implement one stand in brackets."""

    def environment(self, config: RunConfig) -> dict[str, str]:
        """[any] Environment variables to set before torch is imported. Two values for one name are an error."""

    def check(self, plan: Plan) -> None:
        """[any] Refuses what can be seen to be impossible before anything starts: raises UsageError or one of its
        kinds. `plan` is complete but for the run folder."""

    def init_backend(self, ctx: RunContext) -> Backend:
        """[backend] Joins the process group and chooses this rank's device."""

    def prepare(self, preparation: Preparation) -> dict[str, Any]:
        """[workload] `python -m core.prepare`: raw data into what the workload reads. Returns counts to print."""

    def make_workload(self, ctx: RunContext) -> Workload:
        """[workload] The workload; reads no data yet."""

    def prepare_model(self, ctx: RunContext, model: nn.Module) -> nn.Module:
        """[opt, onion] The model on its device, before distribution: memory format, compilation."""

    def distribute(self, ctx: RunContext, model: nn.Module) -> nn.Module:
        """[backend innermost, opt, onion] The model whose backward pass also exchanges gradients. An opt that captures
        parts of the model does so before what lies inside: only processes that train call this."""

    def communication_hook(self, ctx: RunContext, model: nn.Module) -> tuple[Any, Callable[..., Any]]:
        """[opt] `(state, hook)` for DistributedDataParallel's gradient exchange: one owner, which claims
        "ddp.comm_hook". Wrappers around it may act on each bucket's future; without an owner they are given None."""

    def make_optimizer(self, ctx: RunContext, model: nn.Module) -> torch.optim.Optimizer:
        """[workload innermost, opt, onion] The optimizer of the bare `model`."""

    def wrap_batches(self, ctx: RunContext, batches: Iterable[Batch]) -> Iterable[Batch]:
        """[opt, onion] One epoch's batches of this rank, before `ctx.feed` moves them: packing, memory format."""

    def component(self, ctx: RunContext, name: str, default: Any) -> Any:
        """[opt, onion] A seam that is offered by name while the run is built. Core offers "loss" and "infer", each a
        function of `(model, data)`, "feed" (`RunContext.feed`) and "evaluate" (the workload's `Evaluate`); a backend
        offers "ddp", keyword arguments of DistributedDataParallel; a workload offers its own through `ctx.component`,
        such as "rnnt.loss"."""

    def build_step(self, ctx: RunContext, parts: StepParts) -> StepParts:
        """[opt, onion] The halves of a step: accumulation wraps the first, optimizer-in-backward empties the second."""

    def wrap_step(self, ctx: RunContext, step: Any, purpose: Literal["train", "infer"]) -> Any:
        """[opt, onion] The whole step as one callable, a `Step` for "train", a `Forward` for "infer": capture."""

    def wrap_evaluate(self, ctx: RunContext, evaluate: Evaluate) -> Evaluate:
        """[backend, opt, onion] The evaluation of the whole evaluation set: at once, or `Pending`."""

    def on_block(self, ctx: RunContext, position: Position, event: Literal["start", "stop"]) -> None:
        """[trackers, profilers] A block is the training between two evaluations."""

    def on_eval(self, ctx: RunContext, position: Position, quality: dict[str, float]) -> None:
        """[trackers] After each evaluation, on every rank."""

    def on_log(self, ctx: RunContext, position: Position, values: dict[str, float]) -> None:
        """[trackers] About once a second, on every rank: loss, learning rate, samples/s."""

    def verify(self, ctx: RunContext) -> Evidence:
        """[opt, backend] Proof that the plugin took effect: asked for after warm-up and at the end."""


for _name, _hook in vars(Hooks).items():
    if not _name.startswith("_"):
        pluggy.HookspecMarker(PROJECT)(_hook, firstresult=_name not in COLLECTED)
