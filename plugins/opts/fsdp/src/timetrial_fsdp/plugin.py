"""The opt `fsdp`: each rank holds a part of the parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.api.hooks import hookimpl
from core.api.types import Evidence, Forward, OptSpec, Plugin, RunContext, StepParts

if TYPE_CHECKING:
    from torch import nn

    from timetrial_fsdp.sharding import ShardedModel

Evaluate = Callable[[Forward], dict[str, float]]


@dataclass(kw_only=True)
class FsdpConfig:
    """Settings of `opt.fsdp`."""

    reshard_after_forward: bool
    """Free a block's gathered parameters after its forward pass and gather them again for the backward pass; else keep
    them in between, which takes more memory and less communication."""


class Fsdp(Plugin):
    """Fully sharded data parallelism in place of the backend's DistributedDataParallel."""

    spec = OptSpec(
        interface=1,
        summary="parameters, gradients and optimizer state sharded over ranks (FSDP2)",
        requires=frozenset({"multi_rank"}),
        numerics="tolerance",
        conflicts={
            "channels_last": "FSDP2 shards contiguous parameters only, and channels-last weights are not",
            "compile": "it compiles the model as a whole, which FSDP2's hooks around each block break up",
            "cuda_graphs": "parameters are gathered into memory that is freed and allocated again within a step, which "
            "a graph cannot replay",
        },
        claims=frozenset({"distribution", "ddp.comm_hook"}),
    )
    Config = FsdpConfig
    config: FsdpConfig

    _sharded: ShardedModel | None = None

    @hookimpl  # not a wrapper: of those that build, pluggy asks the last registered first, and the backend never
    def distribute(self, ctx: RunContext, model: nn.Module) -> nn.Module:
        from timetrial_fsdp.sharding import ShardedModel

        self._sharded = ShardedModel(
            model, ctx.workload.blocks(ctx.model), ctx.device, ctx.world_size, self.config.reshard_after_forward
        )
        return model

    @hookimpl(wrapper=True)
    def build_step(self, ctx: RunContext) -> Generator[None, StepParts, StepParts]:
        assert self._sharded is not None
        # Not in make_optimizer: another opt may still put a different one in its place.
        self._sharded.give_whole_states(ctx.model, ctx.optimizer)
        return (yield)

    @hookimpl(wrapper=True)
    def wrap_evaluate(self) -> Generator[None, Evaluate, Evaluate]:
        evaluate = yield

        def evaluate_whole(infer: Forward) -> dict[str, float]:
            assert self._sharded is not None
            with self._sharded.whole():  # ranks may evaluate unequally many batches, and could not gather in each
                return evaluate(infer)

        return evaluate_whole

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        if self._sharded is None:
            return Evidence(plugin="fsdp", active=False, summary="no model has been sharded")
        from timetrial_fsdp.sharding import held

        parameters, state = (
            held(ctx.model.parameters()),
            held(value for values in ctx.optimizer.state.values() for value in values.values()),
        )
        summary = f"this rank holds {parameters.local:,} of {parameters.whole:,} bytes of parameters"
        summary += f" and {state.local:,} of {state.whole:,} bytes of optimizer state" if state.whole else ""
        summary += f", gathered in {self._sharded.groups} groups"
        return Evidence(
            plugin="fsdp",
            active=parameters.unsharded == 0 and parameters.local < parameters.whole,
            summary=summary,
            figures={"parameters": vars(parameters), "optimizer_state": vars(state), "groups": self._sharded.groups},
        )
