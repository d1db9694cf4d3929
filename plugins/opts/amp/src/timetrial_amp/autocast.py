"""Autocast around one function, and what the autograd graph says about the kernels that ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.api.tree import map_tensors
from core.api.types import Outputs

_MATRIX_KERNEL = re.compile(
    r"(Convolution|Mkldnn|Cudnn|Thnn|Miopen|Addmm|Mm|Addbmm|Baddbmm|Bmm|Addmv|Mv|Linear|Scaled)\w*Backward"
)
"""Backward nodes of the operations that autocast lowers: products, convolutions, recurrent layers, attention."""

_COMPILED = "CompiledFunctionBackward"
"""The one node of a whole graph that torch.compile made."""

_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Names in /proc/cpuinfo of instructions that multiply bfloat16: x86 (first two) and Arm."""


@dataclass
class Observed:
    """What the first training step's autograd graph held."""

    eager: int = 0
    """Matrix products and convolutions outside compiled graphs."""
    eager_low: int = 0
    """Those among them whose result was in the low-precision format."""
    compiled: int = 0
    """Floating-point tensors that compiled graphs kept for the backward pass."""
    compiled_low: int = 0
    kernels: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def active(self) -> bool:
        return self.eager_low + self.compiled_low > 0


class AutocastLoss:
    """`function(model, data)` under autocast; looks at the graph of its first result, then never again."""

    def __init__(self, function: Callable[[Any, Any], Outputs], device_type: str, dtype: torch.dtype) -> None:
        self.function = autocast(function, device_type, dtype)
        self.dtype = dtype
        self.observed: Observed | None = None

    def __call__(self, model: Any, data: Any) -> Outputs:
        outputs = self.function(model, data)
        if self.observed is None and outputs["loss"].grad_fn is not None:
            self.observed = observe(outputs["loss"], self.dtype)
        return outputs


def autocast(function: Callable[[Any, Any], Any], device_type: str, dtype: torch.dtype) -> Callable[[Any, Any], Any]:
    """`function(model, data)` with its matrix products in `dtype`, and its results back in float32.

    Callers keep the dtype they know; the conversion is exact. A backward pass belongs outside autocast (PyTorch,
    "Automatic Mixed Precision package": its operations run in the dtype that the forward pass chose).
    """

    def widen(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == dtype else tensor

    def run(model: Any, data: Any) -> Any:
        with torch.autocast(device_type, dtype=dtype):
            result = function(model, data)
        return map_tensors(widen, result)

    return run


def observe(loss: Tensor, dtype: torch.dtype) -> Observed:
    """Counts what produced `loss`, by walking its autograd graph once: no extra forward pass, nothing left behind."""
    seen, found = set[Any](), Observed()
    pending: list[Any] = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [parent for parent, _ in node.next_functions]
        name = node.name()
        if name.startswith(_COMPILED):
            kept = [t for t in node.saved_tensors if t is not None and t.is_floating_point()]
            found.compiled += len(kept)
            found.compiled_low += sum(t.dtype == dtype for t in kept)
        elif _MATRIX_KERNEL.match(name):
            found.eager += 1
            found.eager_low += node._input_metadata[0].dtype == dtype  # a node's input is the gradient of its result
            found.kernels[name] = found.kernels.get(name, 0) + 1
    return found


def native_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; if not, it converts to float32 and back, which is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    info = Path("/proc/cpuinfo")
    return info.exists() and not _CPU_FLAGS.isdisjoint(info.read_text().split())
