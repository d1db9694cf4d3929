"""The opt `compile`: torch.compile for the model."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.api.config import checked
from core.api.errors import ConflictError
from core.api.hooks import hookimpl
from core.api.types import Evidence, OptSpec, Plan, Plugin

if TYPE_CHECKING:
    from torch import nn

    from timetrial_compile.compiled import Counts

BACKENDS = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CAPTURING = ("reduce-overhead", "max-autotune")
"""Modes that capture CUDA graphs themselves; graphs cannot be nested."""


@dataclass(kw_only=True)
class CompileConfig:
    """Settings of `opt.compile`, with the meaning that torch.compile gives them."""

    backend: str = checked(choices=BACKENDS)
    """`inductor` generates kernels; the others only trace the model, in seconds, to find what prevents compilation."""
    mode: str = checked(choices=MODES)
    """How long to search for fast kernels, and whether to capture CUDA graphs."""
    dynamic: bool | None
    """Whether sizes are variables in the compiled code: yes, no, or once they have changed (null)."""
    fullgraph: bool
    """Fail where the model does not become a single graph."""


class Compile(Plugin):
    """Compiles the model in place, so that its parameters keep their names."""

    spec = OptSpec(
        interface=2,
        summary="the model through torch.compile",
        requires=frozenset({"cxx"}),
        numerics="tolerance",
    )
    Config = CompileConfig
    config: CompileConfig

    _before: Counts | None = None
    _prepared_at = 0.0
    _drops = False

    @hookimpl
    def check(self, plan: Plan) -> None:
        mode = self.config.mode
        if mode in CAPTURING and "cuda_graphs" in plan.opts:
            raise ConflictError(
                f"opt.compile.mode={mode} captures CUDA graphs, which cannot be inside those of opt 'cuda_graphs': "
                "use opt.compile.mode=default or max-autotune-no-cudagraphs, or leave out 'cuda_graphs'"
            )

    @hookimpl(wrapper=True)
    def prepare_model(self) -> Generator[None, nn.Module, nn.Module]:
        import torch

        from timetrial_compile.compiled import Counts

        model = yield
        # Without its own frame, a model whose class is torch's (nn.Sequential) is silently left uncompiled.
        with torch.compiler.config.patch(wrap_top_frame=True):  # pyright: ignore[reportAttributeAccessIssue]
            model.compile(
                backend=self.config.backend,
                mode=self.config.mode,
                dynamic=self.config.dynamic,
                fullgraph=self.config.fullgraph,
            )
        self._before, self._prepared_at = Counts.now(), time.time()
        self._drops = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
        return model

    @hookimpl
    def verify(self) -> Evidence:
        from timetrial_compile.compiled import Counts, compile_seconds, recompilations

        if self._before is None:
            return Evidence(plugin="compile", active=False, summary="no model was compiled")
        counts = Counts.now().since(self._before)
        breaks, again = (sum(counts.graph_breaks.values()), recompilations(self._prepared_at))
        return Evidence(
            plugin="compile",
            active=counts.graphs > 0,
            summary=f"graphs compiled: {counts.graphs}; graph breaks: {breaks}; recompilations: {len(again)}",
            figures={
                "graphs": counts.graphs,
                "graph_breaks": counts.graph_breaks,
                "recompilations": again,
                "compile_s": round(compile_seconds(self._prepared_at), 3),
            },
            # Generated kernels draw dropout's masks from a generator of their own.
            numerics="changes" if self._drops and self.config.backend == "inductor" else None,
        )
