"""The opt `lean_transducer`: the transducer loss without the (batch, time, label, vocabulary) tensor."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.errors import NotHereError
from core.api.hooks import hookimpl
from core.api.seams import Replacement
from core.api.types import Evidence, OptSpec, Plugin, RunContext
from timetrial_rnnt.seams import JOINT, TRANSDUCER_LOSS

if TYPE_CHECKING:
    from torch import nn

    from timetrial_lean_transducer.loss import LeanLoss

MIB = 2**20


@dataclass(kw_only=True)
class LeanTransducerConfig:
    """Settings of `opt.lean_transducer`."""

    mode: str = checked(choices=("exact", "pruned"))
    """`exact`: the same loss and gradients. `pruned`: the joint network at `prune_range` places of each frame only."""
    chunk: int | None = checked(at_least=1)
    """Cells whose logits exist at a time; null chooses by device."""
    negligible: float = checked(at_least=0, at_most=1e-6)
    """The backward pass leaves out cells whose posterior is below this."""
    prune_range: int = checked(at_least=2)
    """Pruned: places of each frame."""
    simple_scale: float = checked(at_least=0)
    """Pruned: weight of the simple joint's loss."""
    recursion: str = checked(choices=("torch", "triton"))
    """What goes through the lattice: torch's operations, anywhere, or one Triton kernel, on an NVIDIA GPU."""


class LeanTransducer(Plugin):
    """Replaces the transducer loss, the joint network included."""

    spec = OptSpec(
        interface=2,
        summary="transducer loss without the (batch, time, label, vocabulary) tensor; exact, or pruned",
        numerics="tolerance",
        replaces=frozenset({TRANSDUCER_LOSS}),
    )
    Config = LeanTransducerConfig
    config: LeanTransducerConfig

    _loss: LeanLoss | None = None

    @hookimpl
    def replace(self, ctx: RunContext) -> list[Replacement[Any]]:
        if self.config.recursion == "triton" and (ctx.device.type != "cuda" or not find_spec("triton")):
            raise NotHereError("opt.lean_transducer.recursion=triton needs a GPU and the package triton: use torch")
        return [TRANSDUCER_LOSS.by(self._make_loss)]

    def _make_loss(self, inner: Any) -> LeanLoss:
        from timetrial_lean_transducer.loss import LeanLoss

        c = self.config
        span = c.prune_range if c.mode == "pruned" else 0
        self._loss = LeanLoss(
            chunk=c.chunk, negligible=c.negligible, span=span, simple_scale=c.simple_scale, recursion=c.recursion
        )  # fmt: skip
        return self._loss

    @hookimpl(wrapper=True)
    def prepare_model(self, ctx: RunContext, model: nn.Module) -> Generator[None, nn.Module, nn.Module]:
        """Gives the joint network the simple joint that pruning needs, before it is distributed: its parameters are
        then the model's, for the optimizer, the gradient exchange and checkpoints."""
        if self._loss is not None and self._loss.span:  # None where no loss was offered, which core refuses
            from timetrial_lean_transducer.pruning import SimpleJoint

            joint: Any = ctx.model.get_submodule(JOINT)
            simple = SimpleJoint(joint.output.in_features, joint.output.out_features, ctx.seed_for("lean_transducer"))
            joint.add_module("simple", simple.to(ctx.device))
        return (yield)

    @hookimpl
    def verify(self) -> Evidence:
        if self._loss is None or not self._loss.work.peak_bytes:
            return Evidence(
                plugin="lean_transducer", active=False, summary="no loss has been computed for training yet"
            )
        work, logits, pruned = self._loss.work, self._loss.logits_bytes, self.config.mode == "pruned"
        figures = {
            "calls": work.calls, "padded_cells": work.padded, "cells": work.cells, "cells_again": work.revisited,
            "posterior_left_out": float(work.left_out), "widened_calls": self._loss.widened,
            "kept_bytes": work.kept_bytes, "peak_bytes": work.peak_bytes, "logits_bytes": logits,
        }  # fmt: skip
        return Evidence(
            plugin="lean_transducer",
            active=work.kept_bytes < logits,
            summary=f"{self.config.mode}: {work.calls} call{'s' * (work.calls != 1)}; joint network in "
            f"{work.cells / work.padded:.1%} of {work.padded} cells with padding, and again in "
            f"{work.revisited / work.padded:.1%} for the gradient; kept in between {work.kept_bytes / MIB:.2f} MiB, at "
            f"most {work.peak_bytes / MIB:.2f}; all logits take {logits / MIB:.2f}, their gradients as much",
            figures=figures,
            # The masks are as likely as the plain joint network's, but they are others.
            numerics="changes" if pruned or self._loss.dropout else None,
        )
