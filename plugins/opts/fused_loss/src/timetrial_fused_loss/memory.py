"""The most memory that a piece of code held at a time, counted tensor by tensor: the same on every device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """`peak`: the most bytes at one moment in storages that came to be since it was entered.

    Sees the results of operations, not what an operation allocates for itself and frees again. With `on=False` it does
    nothing and costs nothing.
    """

    def __init__(self, on: bool = True) -> None:
        super().__init__()
        self.on = on
        self.peak = self.held = 0
        self._known: dict[int, int] = {}

    def __enter__(self) -> PeakMemory:
        return super().__enter__() if self.on else self

    def __exit__(self, *error: Any) -> None:
        if self.on:
            super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in given | self._known.keys():
                self._add(tensor.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known[storage._cdata] = storage.nbytes()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.held -= self._known.pop(key, 0)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
