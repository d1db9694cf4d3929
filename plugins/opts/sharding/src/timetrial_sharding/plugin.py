"""The opts `fsdp` and `tensor_parallel` as core sees them. Imports without torch."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from core.api.errors import NotHereError
from core.api.hooks import hookimpl
from core.api.mesh import Dimension
from core.api.seams import TENSOR_PLAN, Replacement
from core.api.types import (
    Batch,
    Evaluate,
    Evidence,
    Forward,
    Layout,
    OptSpec,
    Outputs,
    Plan,
    Plugin,
    Quality,
    RunContext,
    StepParts,
)
from timetrial_sharding.config import FsdpConfig, TensorParallelConfig

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from timetrial_sharding.fsdp import ShardedModel
    from timetrial_sharding.layout import SplitLayout
    from timetrial_sharding.tensor import Sums


class Fsdp(Plugin):
    """Shards parameters, gradients and optimizer state over data ranks, in place of DistributedDataParallel."""

    spec = OptSpec(
        interface=2,
        summary="parameters, gradients and optimizer state sharded over data ranks (FSDP2), plain or hybrid",
        requires=frozenset({"multi_rank", "process_group"}),
        numerics="tolerance",
        conflicts={
            "channels_last": "FSDP2 shards contiguous parameters only, and channels-last weights are not",
            "compile": "it compiles the model as a whole, which FSDP2's hooks around each block break up",
            "cuda_graphs": "parameters are gathered into memory that is freed and allocated again within a step, which "
            "a graph cannot replay",
        },
        wraps=frozenset({"tensor_parallel"}),  # what is sharded is each rank's part of a layer
        claims=frozenset({"gradient_exchange", "gradient_exchange.hook"}),  # there are no buckets to act on
    )
    Config = FsdpConfig
    config: FsdpConfig

    _sharded: ShardedModel | None = None
    _layout: SplitLayout | None = None

    @hookimpl
    def dimensions(self) -> list[Dimension]:
        return [Dimension(name="shard", size=self.config.shard_size, splits_data=True, nearness=20)]

    @hookimpl
    def check(self, plan: Plan) -> None:
        if any(d.name == "shard" and d.size == 1 for d in plan.dimensions):
            what = f"opt 'fsdp' has nobody to shard with: {plan.world_size} ranks are one data rank"
            raise NotHereError(f"{what}; start more ranks or leave it out")

    @hookimpl(wrapper=True)
    def distribute(self, ctx: RunContext) -> Generator[None, nn.Module, nn.Module]:
        from timetrial_sharding.fsdp import ShardedModel

        model = yield
        mesh = _device_mesh(ctx)
        over = mesh["data", "shard"] if ctx.mesh.size("data") > 1 else mesh["shard"]
        self._sharded = ShardedModel(model, ctx.workload.blocks(ctx.model), over, self.config.reshard_after_forward)
        return model

    @hookimpl(wrapper=True)
    def lay_out(self, ctx: RunContext) -> Generator[None, Layout, Layout]:
        from timetrial_sharding.layout import SplitLayout

        layout = yield
        # That of `tensor_parallel`, which is inside, knows about shards.
        self._layout = layout if isinstance(layout, SplitLayout) else _split_layout(ctx)
        return self._layout

    @hookimpl(wrapper=True)
    def wrap_evaluate(self) -> Generator[None, Evaluate, Evaluate]:
        evaluate, sharded = (yield), self._sharded
        if sharded is None:  # in a sidecar, which holds the whole model
            return evaluate

        def evaluate_whole(infer: Forward) -> Quality:
            with sharded.whole():  # ranks may evaluate unequally many batches, and could not gather in each
                return evaluate(infer)

        return evaluate_whole

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        from timetrial_sharding.layout import held

        if self._sharded is None or self._layout is None:
            return Evidence(plugin="fsdp", active=False, summary="no model has been sharded")
        parameters, state = held(self._layout.parameters()), held(_state(ctx))
        ranks, copies = ctx.mesh.size("shard"), ctx.mesh.size("data")
        summary = f"this rank holds {parameters.local:,} of {parameters.whole:,} bytes of parameters"
        summary += f" and {state.local:,} of {state.whole:,} bytes of optimizer state" if state.whole else ""
        summary += f", gathered in {self._sharded.groups} groups over {ranks} ranks"
        summary += f"; {copies} copies of the model" if copies > 1 else ""
        return Evidence(
            plugin="fsdp",
            active=parameters.unsharded == 0 and parameters.local < parameters.whole,
            summary=summary,
            figures={
                "parameters": vars(parameters), "optimizer_state": vars(state), "groups": self._sharded.groups,
                "shard_ranks": ranks, "copies": copies,
            },
        )  # fmt: skip


class TensorParallel(Plugin):
    """Splits the linear layers that the workload offers, column- and row-wise, over ranks with the same examples."""

    spec = OptSpec(
        interface=2,
        summary="linear layers split column- and row-wise over a few ranks with the same examples",
        requires=frozenset({"multi_rank", "process_group"}),
        numerics="tolerance",
        conflicts={
            "cuda_graphs": "before each update it hands gradients to the optimizer's views of the parameters, which is "
            "work of the host that a graph does not replay",
            "stream_overlap": "it updates the model's own parameters in the backward pass, and the optimizer holds "
            "views of them",
        },
        wraps=frozenset({"grad_accumulation"}),  # to count all that one update takes
        replaces=frozenset({TENSOR_PLAN}),
    )
    Config = TensorParallelConfig
    config: TensorParallelConfig

    _plan: Mapping[str, str] | None = None
    _splits: Mapping[str, int] | None = None
    _layout: SplitLayout | None = None
    _sums: Sums | None = None
    """Of the last forward and backward pass."""

    @hookimpl
    def dimensions(self) -> list[Dimension]:
        return [Dimension(name="tensor", size=self.config.degree, splits_data=False, nearness=30)]

    @hookimpl
    def replace(self) -> list[Replacement[Any]]:
        return [TENSOR_PLAN.by(self._take)]

    def _take(self, plan: Mapping[str, str]) -> Mapping[str, str]:
        self._plan = plan
        return plan

    @hookimpl(wrapper=True)
    def distribute(self, ctx: RunContext) -> Generator[None, nn.Module, nn.Module]:
        from timetrial_sharding.tensor import parallelize

        model = yield
        if self._plan is not None:  # else core refuses the opt
            self._splits = parallelize(ctx.model, _device_mesh(ctx)["tensor"], self._plan)
        return model

    @hookimpl(wrapper=True)
    def lay_out(self, ctx: RunContext) -> Generator[None, Layout, Layout]:
        layout = yield
        if self._splits is None:
            return layout
        self._layout = _split_layout(ctx, self._splits)
        return self._layout

    @hookimpl(wrapper=True)
    def build_step(self) -> Generator[None, StepParts, StepParts]:
        from timetrial_sharding.tensor import SUMS

        parts = yield
        inner = parts.forward_backward

        def counted(batch: Batch) -> Outputs:
            before = replace(SUMS)
            outputs = inner(batch)
            self._sums = SUMS.since(before)
            return outputs

        return replace(parts, forward_backward=counted)

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        from timetrial_sharding.layout import held

        if self._splits is None or self._layout is None or self._plan is None:
            return Evidence(plugin="tensor_parallel", active=False, summary="no layer has been split")
        parameters, state = held(self._layout.parameters()), held(_state(ctx))
        sums, ranks = self._sums, ctx.mesh.size("tensor")
        compiled = any(module._compiled_call_impl for module in ctx.model.modules())
        summary = f"this rank holds {parameters.local:,} of {parameters.whole:,} bytes of parameters"
        summary += f"; {len(self._splits)} tensors are split over {ranks} ranks"
        figures: dict[str, Any] = {
            "parameters": vars(parameters), "optimizer_state": vars(state), "split": len(self._splits),
            "tensor_ranks": ranks, "data_ranks": ctx.mesh.data_size,
        }  # fmt: skip
        if sums is not None:
            summary += f"; {sums.count} sums of {sums.bytes:,} bytes in all a step"
            summary += ", those in compiled code not counted" if compiled else ""
            figures |= {"sums_per_step": sums.count, "bytes_per_step": sums.bytes, "compiled": compiled}
        return Evidence(
            plugin="tensor_parallel",
            active=parameters.local < parameters.whole and (compiled or (sums is not None and sums.count > 0)),
            summary=summary,
            figures=figures,
            numerics="changes" if "random" in self._plan.values() else None,  # other random numbers than one rank's
        )


def _device_mesh(ctx: RunContext) -> DeviceMesh:
    return ctx.mesh.device_mesh(ctx.device.type)


def _split_layout(ctx: RunContext, splits: Mapping[str, int] | None = None) -> SplitLayout:
    from timetrial_sharding.layout import SplitLayout

    return SplitLayout(ctx.model, ctx.optimizer, _device_mesh(ctx), splits)


def _state(ctx: RunContext) -> list[Any]:
    """The tensors and numbers that the optimizer keeps for each parameter."""
    return [value for values in ctx.optimizer.state.values() for value in values.values()]
