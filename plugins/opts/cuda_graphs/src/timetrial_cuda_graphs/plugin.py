"""The opt `cuda_graphs`: a whole training iteration as one launch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.api.config import checked
from core.api.errors import ConflictError, NotOfferedError, UsageError
from core.api.hooks import hookimpl
from core.api.seams import LOSS
from core.api.types import Backend, Evidence, OptSpec, Plugin, RunContext, Workload

if TYPE_CHECKING:
    import torch
    from torch import nn

    from timetrial_cuda_graphs.graphed import Capture, Graphed
    from timetrial_cuda_graphs.parts import Part

DDP_WARMUP = 11
"""Eager iterations that DistributedDataParallel makes before it can be captured (PyTorch, "CUDA semantics"): it lays
its buckets out anew after the first, and times some of the following ones for its log."""

NEVER = 2**31 - 1
"""Iterations between two that DistributedDataParallel times for its log, which it cannot do while it is captured."""

INFERENCE_WARMUP = 3
"""Eager inference steps before a capture, as many as `torch.cuda.make_graphed_callables` makes."""

NOT_WITH_PARTS = {
    "compile": "torch.compile cannot look into those",
    # Besides, make_graphed_callables returns gradients that its next backward pass overwrites (pytorch #181723).
    "grad_accumulation": "those are captured for whole batches, and micro-batches are smaller",
}
"""Opts that conflict where only parts of a model are captured, each with the reason."""


@dataclass(kw_only=True)
class CudaGraphsConfig:
    """Settings of `opt.cuda_graphs`."""

    RENAMED: ClassVar[Mapping[str, str]] = {"warmup": "eager_steps"}

    eager_steps: int = checked(at_least=1)
    """Eager steps before the first capture; they are real, counted steps."""
    max_graphs: int = checked(at_least=1)
    """Graphs kept for training, and as many for inference."""
    max_shapes: int = checked(at_least=1)
    """Where only parts of a model are captured: shapes of batches for which they are."""
    inference: bool
    """Whether inference steps are captured too."""


class CudaGraphs(Plugin):
    """Captures the training iteration, from the loss to the update, and the inference step; or the parts of the model
    that the workload names, where the whole step cannot be captured."""

    spec = OptSpec(
        interface=2,
        summary="the whole training iteration as one CUDA graph",
        requires=frozenset({"cuda"}),
        numerics="tolerance",
        wraps=frozenset({
            "amp", "channels_last", "compile", "fused_loss", "fused_optimizer", "grad_accumulation",
            "gradient_compression", "sequence_packing", "sharp", "static_detection", "stream_overlap", "unpad",
            "zero_copy_concat",
        }),
    )  # fmt: skip
    Config = CudaGraphsConfig
    config: CudaGraphsConfig

    _capture: Capture | None = None
    _rounds_otherwise = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._steps: dict[str, Graphed] = {}
        self._parts: dict[str, Part] = {}

    # ------------------------------------------------------------------------------------ what can be captured at all

    @hookimpl(wrapper=True)
    def init_backend(self) -> Generator[None, Backend, Backend]:
        from timetrial_cuda_graphs.cuda import leave_the_default_stream

        backend = yield
        leave_the_default_stream(backend.device)
        return backend

    @hookimpl(wrapper=True)
    def make_workload(self) -> Generator[None, Workload, Workload]:
        workload = yield
        if not (workload.capture.step or workload.capture.parts):
            raise NotOfferedError(
                f"opt 'cuda_graphs': no part of a step of {workload.spec.benchmark} can be captured; leave it out"
            )
        return workload

    # --------------------------------------------------------------------------------------------- parts, or the whole

    @hookimpl(wrapper=True)
    def distribute(self, ctx: RunContext, model: nn.Module) -> Generator[None, nn.Module, nn.Module]:
        capture = ctx.workload.capture
        if not capture.step:
            for name, reason in NOT_WITH_PARTS.items():
                if name in ctx.config.opt:
                    raise ConflictError(
                        f"opts '{name}' and 'cuda_graphs' conflict for a workload of which only parts can be captured: "
                        f"{reason}; leave one out"
                    )
            from torch.cuda import graph_pool_handle, make_graphed_callables

            from timetrial_cuda_graphs.parts import graph_parts

            make_graphed = partial(make_graphed_callables, pool=graph_pool_handle())
            self._parts = graph_parts(
                model, capture.parts, _forward_passes(ctx, model), self.config.max_shapes, ctx.device, make_graphed
            )
        return (yield)

    @hookimpl(wrapper=True)
    def make_optimizer(self, ctx: RunContext) -> Generator[None, torch.optim.Optimizer, torch.optim.Optimizer]:
        from timetrial_cuda_graphs.optimizer import make_capturable

        optimizer = yield
        if ctx.workload.capture.step:
            self._rounds_otherwise = make_capturable(optimizer, on_load=self._forget)
        return optimizer

    @hookimpl(wrapper=True)
    def wrap_step(self, ctx: RunContext, purpose: Literal["train", "infer"]) -> Generator[None, Any, Any]:
        from timetrial_cuda_graphs.cuda import CudaCapture

        step = yield
        if not ctx.workload.capture.step or (purpose == "infer" and not self.config.inference):
            return step
        self._capture = self._capture or CudaCapture()
        make = self._graphed_training if purpose == "train" else self._graphed_inference
        self._steps[purpose] = make(ctx, step, self._capture)
        return self._steps[purpose]

    def _graphed_training(self, ctx: RunContext, step: Any, capture: Capture) -> Graphed:
        from torch.nn.parallel import DistributedDataParallel

        from timetrial_cuda_graphs.cuda import refusing
        from timetrial_cuda_graphs.graphed import Graphed
        from timetrial_cuda_graphs.optimizer import REMEDY, replayable

        for ddp in (m for m in ctx.distributed_model.modules() if isinstance(m, DistributedDataParallel)):
            if self.config.eager_steps < DDP_WARMUP:
                raise UsageError(
                    f"opt.cuda_graphs.eager_steps={self.config.eager_steps}: with DistributedDataParallel at least "
                    f"{DDP_WARMUP} eager steps are needed"
                )
            ddp._set_ddp_runtime_logging_sample_rate(NEVER)
        hint = f"leave out 'cuda_graphs', or {REMEDY} if it is the optimizer that waits for the device"
        return Graphed(
            step,
            replayable(refusing(capture, "the training step", hint), ctx.optimizer),
            eager_calls=self.config.eager_steps,
            max_graphs=self.config.max_graphs,
            gather=(lambda number: [row[0] for row in ctx.backend.all_gather([number])])
            if ctx.world_size > 1
            else None,
            static_shapes=len(list(islice(ctx.workload.example_batches(), 2))) == 1,
        )

    def _graphed_inference(self, ctx: RunContext, step: Any, capture: Capture) -> Graphed:
        from timetrial_cuda_graphs.cuda import refusing
        from timetrial_cuda_graphs.graphed import Graphed

        return Graphed(
            step,
            refusing(capture, "the inference step", "set opt.cuda_graphs.inference=false"),
            eager_calls=INFERENCE_WARMUP,
            max_graphs=self.config.max_graphs,
            mode=lambda: ctx.model.training,
        )

    def _forget(self) -> None:
        for step in self._steps.values():
            step.forget()

    # ---------------------------------------------------------------------------------------------------------- proof

    @hookimpl
    def verify(self) -> Evidence:
        from timetrial_cuda_graphs.evidence import of_parts, of_steps

        if self._parts:
            return of_parts(self._parts)
        return of_steps({purpose: step.seen for purpose, step in self._steps.items()}, self._rounds_otherwise)


def _forward_passes(ctx: RunContext, model: nn.Module) -> Iterator[Callable[[], Any]]:
    """Forward passes of training on random data, one for each shape that the workload names."""
    loss = ctx.offer(LOSS, ctx.workload.loss)
    for example in ctx.workload.example_batches():
        (batch,) = ctx.to_device([example], "warm_up")  # one by one: nothing may be copied ahead during a recording
        yield partial(loss, model, batch.data)
