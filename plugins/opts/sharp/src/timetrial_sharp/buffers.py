"""Gradient buckets in memory that NCCL allocates and registers, so that switches read and write them without a copy.

NCCL, "User Buffer Registration"; torch.cuda.MemPool. Not run on a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class RegisteredBuckets:
    """A pool for buckets that `group` exchanges. RuntimeError where this NCCL or GPU has no such memory."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        self._backend = group._get_backend(device)
        self._pool = torch.cuda.MemPool(self._backend.mem_allocator)
        self._device = device

    def allocate(self) -> AbstractContextManager[None]:
        """Within it, this thread's allocations come from the pool."""
        return torch.cuda.use_mem_pool(self._pool, self._device)

    def regroup(self, model: DistributedDataParallel) -> None:
        """After the first backward pass: the model regroups its buckets now, in the pool, instead of anywhere at the
        start of the next step; then NCCL registers the pool."""
        with self.allocate():
            model.reducer._rebuild_buckets()
        self._backend.register_mem_pool(self._pool)
