"""Every hook that a plugin may implement, in the order in which a run calls them.

Mark an implementation with `hookimpl`. An *onion* hook is implemented as a wrapper around what is inside it:

    @hookimpl(wrapper=True)
    def prepare_model(self, ctx, model):
        model = yield               # what the opts inside this one, and core, made of it
        return model.to(memory_format=torch.channels_last)

The order is the same for every hook and never depends on the command line: core is innermost, then the backend, then
the opts (an opt encloses those that its spec `wraps`), and the workload is outermost. Hooks build the step; none is
called inside one. An implementation may leave out arguments, but not rename them.
"""

# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import nn

    from core.api.config import RunConfig
    from core.api.mesh import Dimension
    from core.api.preparation import Preparation
    from core.api.seams import Replacement
    from core.api.types import (
        Backend,
        Batch,
        Evaluate,
        Evidence,
        Layout,
        Plan,
        Position,
        Purpose,
        RunContext,
        StepParts,
        Workload,
    )

__all__ = ["hookimpl"]

PROJECT = "timetrial"
hookimpl = pluggy.HookimplMarker(PROJECT)
COLLECTED = frozenset({
    "dimensions", "environment", "check", "replace", "verify", "on_run", "on_block", "on_eval", "on_log", "on_record",
})  # fmt: skip
"""Hooks that every plugin is asked; of the others the first plugin that has one gives the result."""


class Hooks:
    """Every hook. The kinds of plugin that usually implement one are given in brackets."""

    # ------------------------------------------------------------- before a process starts, in processes without torch

    def dimensions(self, config: RunConfig) -> list[Dimension]:
        """[opt] The dimensions that it adds to the mesh of ranks."""

    def environment(self, config: RunConfig) -> dict[str, str]:
        """[any] Environment variables to set before torch is imported. Two values for one name are an error."""

    def check(self, plan: Plan) -> None:
        """[any] Refuses what can be seen to be impossible before anything starts: raises UsageError or one of its
        kinds. `plan` is complete but for the run folder."""

    def prepare(self, preparation: Preparation) -> dict[str, Any]:
        """[workload] `timetrial prepare`: raw data into what the workload reads. Returns counts to print."""

    # ---------------------------------------------------------------------------------------- while a rank is built

    def init_backend(self, ctx: RunContext) -> Backend:
        """[backend innermost, opt] Joins the process group and chooses this rank's device."""

    def make_workload(self, ctx: RunContext) -> Workload:
        """[workload, opt] The workload; reads no data yet."""

    def replace(self, ctx: RunContext) -> list[Replacement[Any]]:
        """[opt] Its replacements for the seams that its spec `replaces`: see `core.api.seams`."""

    def prepare_model(self, ctx: RunContext, model: nn.Module) -> nn.Module:
        """[opt, onion] The model on its device, before distribution: memory format, compilation."""

    def distribute(self, ctx: RunContext, model: nn.Module) -> nn.Module:
        """[opt, onion] The model as it trains on several ranks: with its layers split, its parameters sharded, its
        gradients averaged in the backward pass. Only processes that train call this, not sidecars."""

    def make_optimizer(self, ctx: RunContext, model: nn.Module) -> torch.optim.Optimizer:
        """[core innermost, opt, onion] The optimizer of the bare `model`."""

    def lay_out(self, ctx: RunContext, layout: Layout) -> Layout:
        """[opt, onion] How the state of model and optimizer is laid out over ranks, from an opt that splits them."""

    def build_step(self, ctx: RunContext, parts: StepParts) -> StepParts:
        """[opt, onion] The halves of a step: accumulation wraps the first, optimizer-in-backward empties the second."""

    def wrap_step(self, ctx: RunContext, step: Any, purpose: Literal["train", "infer"]) -> Any:
        """[opt, onion] The whole step as one callable, a `Step` for "train", a `Forward` for "infer": capture."""

    def wrap_evaluate(self, ctx: RunContext, evaluate: Evaluate) -> Evaluate:
        """[backend, opt, workload, onion] What has to be done around each evaluation; the seam EVALUATE is the
        evaluation itself."""

    def transform(self, ctx: RunContext, batches: Iterable[Batch], purpose: Purpose) -> Iterable[Batch]:
        """[opt, onion] A stream of this rank's batches before the feed moves them to the device: packing, memory
        format. Called once an epoch, once for the batches of an evaluation, and for the warm-up."""

    # ------------------------------------------------------------------------------------- while it runs, and after

    def on_run(self, ctx: RunContext, event: Literal["init", "start", "stop", "failed"], status: str) -> None:
        """[tracker] "init": the run folder is open and nothing is built, so that `ctx` holds the configuration, the
        backend and the mesh alone; "start": everything is built and the clock starts; "stop": the clock has stopped,
        and `status` says how the run ended; "failed": an error ended it, whose kind is `status`."""

    def on_block(
        self, ctx: RunContext, position: Position, event: Literal["start", "stop"], first_epoch: int, epochs: int
    ) -> None:
        """[tracker] A block is the training between two evaluations: `epochs` of them from `first_epoch` on."""

    def on_eval(self, ctx: RunContext, position: Position, done: int, quality: Mapping[str, float] | None) -> None:
        """[tracker] An evaluation begins (`quality` is None) or its quality is known, on every rank. `done` counts the
        epochs, or the samples, that came before it, by the workload's cadence."""

    def on_log(self, ctx: RunContext, position: Position, values: Mapping[str, float]) -> None:
        """[tracker] About once a second, on every rank: loss, learning rate, samples/s."""

    def verify(self, ctx: RunContext) -> Evidence:
        """[opt, backend] Proof that the plugin took effect: asked for after the warm-up and at the end."""

    def on_record(self, ctx: RunContext, result: Mapping[str, Any], artifacts: Mapping[str, Path]) -> None:
        """[tracker] On rank 0, when the run folder is complete: what result.json holds, and the files worth keeping, by
        name."""


for _name, _hook in vars(Hooks).items():
    if not _name.startswith("_"):
        pluggy.HookspecMarker(PROJECT)(_hook, firstresult=_name not in COLLECTED)
