"""What one optimizer step is made of: the operations that torch dispatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

HOST_READ = "_local_scalar_dense"
"""The operation behind `.item()`, `float(tensor)` and their like."""


@dataclass
class Observed:
    """Counts of one step."""

    tensors: int = 0
    """Parameters that it updated."""
    multi_tensor: int = 0
    """Operations over lists of tensors (torch's `_foreach_*` and `_fused_*`)."""
    single: int = 0
    """All others."""
    host_reads: int = 0
    """Values that the host read, for which it has to wait."""


class Counting(TorchDispatchMode):
    """Counts operations while it is entered; costs microseconds an operation, so it is entered once."""

    def __init__(self) -> None:
        super().__init__()
        self._counts = Observed()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name == HOST_READ:
            self._counts.host_reads += 1
        elif name.startswith(("_foreach_", "_fused_")):
            self._counts.multi_tensor += 1
        else:
            self._counts.single += 1
        return func(*args, **(kwargs or {}))

    def observed(self, tensors: int) -> Observed:
        """The counts, of a step over this many parameters."""
        self._counts.tensors = tensors
        return self._counts
