"""The opt `gradient_compression`: fewer bytes between ranks in each step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from core.api.config import checked
from core.api.errors import ConflictError, NotHereError
from core.api.hooks import hookimpl
from core.api.seams import GRADIENT_EXCHANGE, Replacement
from core.api.types import Evidence, OptSpec, Plan, Plugin, RunContext

if TYPE_CHECKING:
    from timetrial_gradient_compression.exchange import Bf16, PowerSgd

POWERSGD = "opt.gradient_compression.method=powersgd"


@dataclass(kw_only=True)
class GradientCompressionConfig:
    """Settings of `opt.gradient_compression`."""

    method: str = checked(choices=("bf16", "powersgd"))
    """`bf16`: gradients travel in bfloat16. `powersgd`: gradients of matrices travel as two low-rank factors."""
    rank: int = checked(at_least=1)
    """PowerSGD: columns of each factor; more cost more and keep more."""
    start_step: int = checked(at_least=2)
    """PowerSGD: steps that are exchanged whole first. DistributedDataParallel regroups its buckets after its first
    backward pass, hence 2 at least."""
    min_rate: float = checked(above=0)
    """PowerSGD: a matrix whose factors are not smaller than it by this factor travels whole."""


class GradientCompression(Plugin):
    """Owns DistributedDataParallel's gradient exchange and makes it smaller."""

    spec = OptSpec(
        interface=2,
        summary="gradients travel between ranks in bfloat16 or as low-rank factors (PowerSGD)",
        requires=frozenset({"multi_rank"}),
        numerics="changes",
        claims=frozenset({"gradient_exchange.hook"}),
        replaces=frozenset({GRADIENT_EXCHANGE}),
    )
    Config = GradientCompressionConfig
    config: GradientCompressionConfig

    _exchange: Bf16 | PowerSgd | None = None
    _begun = False

    @hookimpl
    def check(self, plan: Plan) -> None:
        if self.config.method != "powersgd":
            return
        if plan.root.prewarm_steps == 0:
            raise ConflictError(
                f"{POWERSGD} needs prewarm_steps of at least 1: buckets take their final shape after the first "
                "backward pass, and a resumed run's state for each belongs to that shape"
            )
        if "cuda_graphs" in plan.opts:
            raise ConflictError(
                f"{POWERSGD} waits for the device in each step, which a CUDA graph cannot capture: use method=bf16, or "
                "leave opt 'cuda_graphs' out"
            )

    @hookimpl
    def replace(self, ctx: RunContext) -> list[Replacement[Any]]:
        return [GRADIENT_EXCHANGE.by(partial(self._smaller, ctx))]

    def _smaller(self, ctx: RunContext, inner: Any) -> Any:
        import torch

        from timetrial_gradient_compression.exchange import Bf16, PowerSgd

        c, mesh = self.config, ctx.mesh.device_mesh(ctx.device.type)["data"]
        if c.method == "bf16":
            self._exchange = Bf16(mesh)
            return None, self._exchange.exchange
        if ctx.device.type == "cpu" and torch.cuda.is_available():
            raise NotHereError(
                f"{POWERSGD} on CPU ranks works only where torch sees no GPU, because torch's hook waits for any it "
                "sees: set CUDA_VISIBLE_DEVICES to nothing, or use backend=nccl"
            )
        seed = ctx.seed_for("gradient_compression")  # without the rank: every rank must draw the same matrices
        self._exchange = PowerSgd(mesh, c.rank, c.start_step, c.min_rate, seed)
        return None, self._exchange.exchange

    @hookimpl
    def on_block(self, event: Literal["start", "stop"]) -> None:
        if self._exchange and event == "start" and not self._begun:
            self._exchange.reset()  # warm-up leaves no trace
            self._begun = True

    @hookimpl
    def verify(self) -> Evidence:
        name, exchange = "gradient_compression", self._exchange
        if exchange is None or exchange.compressed.steps + exchange.whole.steps == 0:
            return Evidence(plugin=name, active=False, summary="no gradient has been exchanged yet")
        traffic, whole = exchange.compressed, exchange.whole
        figures = {"method": self.config.method, "compressed": vars(traffic), "whole": vars(whole)}
        if traffic.steps == 0:
            summary = f"{whole.steps} steps exchanged whole: compression starts after {self.config.start_step}"
            return Evidence(plugin=name, active=False, summary=summary, figures=figures)
        sent, before = traffic.sent // traffic.steps, traffic.gradients // traffic.steps
        summary = f"{self.config.method}: {sent:,} bytes a step all-reduced instead of {before:,}"
        summary += f", {before / sent:.2f} times fewer, in {traffic.steps} steps"
        summary += f"; {whole.steps} steps exchanged whole" if whole.steps else ""
        figures |= {"bytes_a_step": sent, "uncompressed_bytes_a_step": before, "rate": before / sent}
        return Evidence(plugin=name, active=sent < before, summary=summary, figures=figures)

    def state_dict(self) -> dict[str, Any]:
        return self._exchange.state_dict() if self._exchange else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._exchange:
            self._exchange.reset()
            self._exchange.load_state_dict(state)
            self._begun = True
