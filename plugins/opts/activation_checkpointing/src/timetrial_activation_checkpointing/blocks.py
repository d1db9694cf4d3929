"""A block whose activations are recomputed in the backward pass, without any change of module or name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


class CheckpointedBlock:
    """Takes the place of `block.forward`, which it calls: once in the forward pass, once more in the backward pass.

    The random generators are put back for the second call, so that dropout drops the same values, and running
    statistics are updated by the first call alone.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.block, self.forward, self.device = block, block.forward, device
        self.recomputed = 0
        """How often the backward pass has called it."""
        self.saved = self.saved_whole = 0
        """Bytes that one forward pass kept for the backward pass, and those that it would have kept without."""
        self.compiled = False
        """Whether torch.compile has taken it in as a block to recompute."""
        self._norms: list[_NormBase] | None = None
        block.forward = self._replacement()

    def _replacement(self) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return self.forward(*args, **kwargs)
            if torch.compiler.is_compiling():  # what the compiler recomputes leaves buffers alone, and counts nothing
                self._note_compiled()
                return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
            if self._norms is None:
                self._observe(args, kwargs)
            return self._checkpointed(*args, **kwargs)

        return forward  # a function: the compiler traces no bound `__call__` that is an attribute of a module

    def _checkpointed(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._recomputation()

    @contextmanager
    def _recomputation(self) -> Generator[None]:
        self.recomputed += 1
        with statistics_kept(self._norms or []):
            yield

    @torch.compiler.assume_constant_result
    def _note_compiled(self) -> None:
        """Called while the compiler traces, never by what it makes."""
        self.compiled = True

    def _observe(self, args: Any, kwargs: Any) -> None:
        """Runs the first call twice more, to see what it keeps with and without; only one block's worth at a time, for
        the model may not fit otherwise."""
        self._norms = [m for m in self.block.modules() if isinstance(m, _NormBase)]
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type), statistics_kept(self._norms):
            self.saved_whole = saved_bytes(self.block, lambda: self.forward(*args, **kwargs))
            self.saved = saved_bytes(self.block, lambda: self._checkpointed(*args, **kwargs))


@contextmanager
def statistics_kept(norms: Iterable[_NormBase]) -> Generator[None]:
    """Batch normalisation in training mode that leaves its running statistics as they are.

    With momentum 0 the new mean and variance are the old ones, bit for bit. The tensors that autograd saves stay the
    same in number, which is what the recomputation is checked against; without statistics it would save fewer.
    """
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, *_ in before:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def saved_bytes(block: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of `call()`, one forward pass of `block`: each storage once, without its weights."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    for held in itertools.chain(block.parameters(), block.buffers()):
        kept.pop(held.untyped_storage().data_ptr(), None)
    del result  # until here it held the graph, and so every storage in `kept`
    return sum(kept.values())
