"""The most memory that a piece of code held at a time, counted tensor by tensor: the same on every device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Counts the storages that operations inside it bring forth: `held` bytes now, `peak` bytes at most.

    What an operation allocates for itself and frees again is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for tensor in _tensors(results):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
        return results

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
