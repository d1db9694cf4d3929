"""The opt `sharp`: an all-reduce whose data crosses each network link once."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from core.api.config import checked
from core.api.errors import ConflictError, NotHereError
from core.api.hooks import hookimpl
from core.api.mesh import Mesh
from core.api.seams import GRADIENT_BUCKETS, GRADIENT_EXCHANGE, Replacement
from core.api.types import Backend, Batch, Evidence, OptSpec, Outputs, Plan, Plugin, RunContext, StepParts
from timetrial_sharp import in_network
from timetrial_sharp.nodes import Nodes, declared, launched, launcher_node, refuse_two_levels, sets_of_peers

if TYPE_CHECKING:
    from torch import nn

    from timetrial_sharp.buffers import RegisteredBuckets
    from timetrial_sharp.two_level import TwoLevel

MIB = 2**20


@dataclass(kw_only=True)
class SharpConfig:
    """Settings of `opt.sharp`."""

    RENAMED: ClassVar[Mapping[str, str]] = {"chunk_mb": "chunk_mib", "bucket_cap_mb": "bucket_cap_mib"}

    reduction: str = checked(choices=("auto", "in_network", "two_level"))
    """Who adds up: the switches (NCCL), or the ranks, first within nodes and then between them."""
    ranks_per_node: int | None = checked(at_least=1)
    """Consecutive ranks that share a node; None: as the launcher says."""
    chunk_mib: float = checked(above=0)
    """two_level: MiB of gradients that pass through its phases together."""
    bucket_cap_mib: float = checked(above=0)
    """in_network: the least MiB of a bucket of gradients."""
    register_buffers: bool
    """in_network: buckets in memory that NCCL registers."""


class Sharp(Plugin):
    """Sums gradients in the network, or within nodes before they cross it."""

    spec = OptSpec(
        interface=2,
        summary="all-reduce that crosses each network link once: SHARP, NVLS, or two levels",
        requires=frozenset({"multi_rank"}),
        numerics="tolerance",
        claims=frozenset({"gradient_exchange.hook"}),
        conflicts={"fsdp": "it exchanges gradients itself, not through DistributedDataParallel"},
        wraps=frozenset({"ddp"}),  # it decides, and finds memory for the buckets, before that wraps the model
        replaces=frozenset({GRADIENT_BUCKETS, GRADIENT_EXCHANGE}),
    )
    Config = SharpConfig
    config: SharpConfig

    _nodes: Nodes
    """Of the ranks that exchange gradients with this one."""
    _sets: list[Nodes]
    """These, and those of the other ranks where the model is split."""
    _in_network: bool
    _two_level: TwoLevel | None = None
    _buckets: RegisteredBuckets | None = None
    _unregistered = ""
    """Why the buckets are not in registered memory."""

    # ----------------------------------------------------------------------------------- before the ranks have met

    @hookimpl
    def environment(self) -> dict[str, str]:
        if self.config.reduction == "two_level":
            return {}
        library = in_network.plugin_library()  # only NCCL reads these variables
        return {**in_network.REQUEST, **({"NCCL_NET_PLUGIN": str(library)} if library else {})}

    @hookimpl
    def check(self, plan: Plan) -> None:
        if self.config.ranks_per_node is None:
            return  # only the ranks know which of them share a node
        nodes = sets_of_peers(declared(plan.world_size, self.config.ranks_per_node), Mesh(plan.dimensions))[0]
        if self.config.reduction == "two_level":
            refuse_two_levels(nodes)

    @hookimpl(wrapper=True)
    def init_backend(self, ctx: RunContext) -> Generator[None, Backend, Backend]:
        rank = int(os.environ.get("RANK", "0"))  # NCCL opens its log when the ranks meet
        os.environ.setdefault("NCCL_DEBUG_FILE", str(in_network.log_file(ctx.run_dir, rank)))
        return (yield)

    # ----------------------------------------------------------------------------------------- while the run is built

    @hookimpl(wrapper=True)
    def distribute(self, ctx: RunContext) -> Generator[None, nn.Module, nn.Module]:
        self._decide(ctx)
        if not self._in_network or not self.config.register_buffers:
            return (yield)
        from timetrial_sharp.buffers import RegisteredBuckets

        try:
            group = ctx.mesh.device_mesh(ctx.device.type)["data"].get_group()
            self._buckets = RegisteredBuckets(ctx.device, group)
        except RuntimeError as error:
            self._unregistered = str(error).partition("\n")[0]
            return (yield)
        with self._buckets.allocate():
            return (yield)

    def _decide(self, ctx: RunContext) -> None:
        """Which way this run's data goes; refuses where neither would help. The same on every rank."""
        c, nccl = self.config, ctx.device.type == "cuda"
        if c.ranks_per_node:
            whole = declared(ctx.world_size, c.ranks_per_node)
        else:
            whole = launched([int(node) for (node,) in ctx.backend.all_gather([launcher_node()])])
        self._sets = sets_of_peers(whole, ctx.mesh)
        self._nodes = next(nodes for nodes in self._sets if any(ctx.rank in node for node in nodes.ranks))
        if c.reduction == "in_network" and not nccl:
            raise ConflictError("opt.sharp.reduction=in_network needs NCCL: use backend=nccl, or reduction=two_level")
        one_node = self._nodes.count == 1
        wanted = c.reduction == "in_network" or (c.reduction == "auto" and nccl)
        found = one_node or c.reduction == "in_network" or in_network.plugin_library() is not None
        self._in_network = ctx.backend.broadcast(wanted and found)
        if not self._in_network:
            refuse_two_levels(self._nodes)
        elif one_node and ctx.backend.broadcast(self._log(ctx).nvls_missing):
            raise NotHereError(
                f"opt 'sharp' cannot help: all {self._nodes.world_size} ranks are on one node (says "
                f"{self._nodes.source}), and NCCL finds no NVLink SHARP there; leave the opt out"
            )

    @hookimpl
    def replace(self, ctx: RunContext) -> list[Replacement[Any]]:
        return [GRADIENT_BUCKETS.by(self._large), GRADIENT_EXCHANGE.by(partial(self._exchange, ctx))]

    def _large(self, inner: dict[str, Any]) -> dict[str, Any]:
        if not self._in_network:
            return inner
        return {**inner, "bucket_at_least_mb": max(inner["bucket_at_least_mb"], self.config.bucket_cap_mib)}

    def _exchange(self, ctx: RunContext, inner: Any) -> Any:
        if self._in_network:
            return inner  # DistributedDataParallel's own all-reduce, which NCCL hands to the switches
        from timetrial_sharp.two_level import TwoLevel

        self._two_level = TwoLevel(
            self._sets,
            ctx.rank,
            ctx.device,
            chunk_bytes=int(self.config.chunk_mib * MIB),
            timeout=timedelta(seconds=ctx.config.launch.timeout_s),
        )
        return None, self._two_level.exchange

    @hookimpl(wrapper=True)
    def build_step(self, ctx: RunContext) -> Generator[None, StepParts, StepParts]:
        inner, buckets = (yield), self._buckets
        if buckets is None:
            return inner
        regrouped = False

        def forward_backward(batch: Batch) -> Outputs:
            nonlocal regrouped
            outputs = inner.forward_backward(batch)
            if not regrouped:
                regrouped = True
                buckets.regroup(ctx.distributed_model)
            return outputs

        return replace(inner, forward_backward=forward_backward)

    # ------------------------------------------------------------------------------------------------------- evidence

    @hookimpl
    def verify(self, ctx: RunContext) -> Evidence:
        place = f"{self._nodes.count} nodes of {self._nodes.ranks_per_node} ranks (says {self._nodes.source})"
        active, summary, figures = self._seen_in_log(ctx) if self._in_network else self._counted()
        figures = {
            "reduction": "in_network" if self._in_network else "two_level",
            "nodes": self._nodes.count,
            "ranks_per_node": self._nodes.ranks_per_node,
            **figures,
        }
        return Evidence(plugin="sharp", active=active, summary=f"{summary}; {place}", figures=figures)

    def _counted(self) -> tuple[bool, str, dict[str, Any]]:
        traffic = self._two_level.traffic if self._two_level else None
        if traffic is None or not traffic.buckets:
            return False, "two-level all-reduce: no gradient has been exchanged", {}
        shares, whole = traffic.across_bytes / MIB, traffic.gradient_bytes / MIB
        summary = f"two-level all-reduce: each rank exchanged {shares:.1f} of {whole:.1f} MiB with other nodes"
        summary += f" (buckets: {traffic.buckets:,}, chunks: {traffic.chunks:,})"
        return traffic.across_bytes < traffic.gradient_bytes, summary, asdict(traffic)

    def _seen_in_log(self, ctx: RunContext) -> tuple[bool, str, dict[str, Any]]:
        if ctx.rank > 0:
            return True, "only rank 0 logs which algorithm NCCL chose", {}
        log, library = self._log(ctx), in_network.plugin_library()
        share = log.in_network_share
        counts = ", ".join(f"{name} {log.calls[name]}" for name in sorted(log.calls)) or "none in the log"
        summary = f"in-network reduction of {share:.0%} of the bytes; all-reduces by algorithm: {counts}"
        if share < 0.5:  # the most of it should have gone there
            reasons = log.reasons or ["NCCL gives no reason"]
            summary = f"asked for in-network reduction, but not used: {summary}; {'; '.join(reasons)}"
        if self._unregistered:
            summary += f"; buffers not registered: {self._unregistered}"
        figures = {**asdict(log), "in_network_share": share, "plugin_library": library and str(library)}
        return share >= 0.5, summary, figures

    def _log(self, ctx: RunContext) -> in_network.NcclLog:
        path = in_network.log_file(ctx.run_dir, ctx.rank)
        return in_network.read_log(path.read_text(errors="replace").splitlines() if path.is_file() else [])
