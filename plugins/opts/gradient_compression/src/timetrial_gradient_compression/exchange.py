"""Gradient exchanges that send fewer bytes, and what they sent.

A *bucket* is the flat float32 buffer in which DistributedDataParallel collects the gradients of several parameters. An
exchange is given one bucket after the other and returns a future of its mean over ranks.
"""

# Without `from __future__ import annotations`: DistributedDataParallel reads a hook's annotations, as types.

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.futures import Future

from core.api.errors import UsageError

ORTHOGONALIZATION_EPSILON = 1e-8
"""Added to the norm of each column, as torch proposes where a gradient may be all zeros; else it would become NaN."""


@dataclass
class Traffic:
    """Totals of one rank."""

    steps: int = 0
    gradients: int = 0
    """Bytes of gradients to exchange."""
    sent: int = 0
    """Bytes that were handed to all-reduce instead."""


class CountingGroup(dist.ProcessGroup):
    """The process group of a `mesh` with one dimension, which counts the bytes that it is given to all-reduce."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh.get_local_rank(), mesh.size())
        self._mesh = mesh
        self.traffic = Traffic()
        """Where they are added."""

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        self.traffic.sent += sum(t.nbytes for t in tensors)
        # Looked up each time: a reference kept here would outlive the group, whose threads then abort the process.
        return self._mesh.get_group().allreduce(tensors, options)


class Bf16:
    """Sends each bucket in bfloat16, rounded and divided by the number of ranks before it is summed."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = CountingGroup(mesh)
        self.whole = Traffic()
        self.reset()

    def reset(self) -> None:
        self.compressed = self.group.traffic = Traffic()

    def exchange(self, state: None, bucket: dist.GradBucket) -> Future[Tensor]:
        _count(self.compressed, bucket)
        return bf16_compress_hook(self.group, bucket)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class PowerSgd:
    """Sends the gradient M (n x m) of a matrix as factors P (n x rank) and Q (m x rank), with M about P Qᵀ.

    What the factors miss is kept, and added to the next step's gradient (error feedback); the next step starts from
    this step's Q. Both are state: `state_dict` holds them, for each bucket. Vogels et al., arXiv 1905.13727.
    """

    def __init__(self, mesh: DeviceMesh, rank: int, start_step: int, min_rate: float, seed: int) -> None:
        self.group = CountingGroup(mesh)
        self.rank, self.start_step, self.min_rate, self.seed = rank, start_step, min_rate, seed
        self.device_type = mesh.device_type
        self.reset()

    def reset(self) -> None:
        self.whole, self.compressed = Traffic(), Traffic()
        self.state = PowerSGDState(
            self.group,
            matrix_approximation_rank=self.rank,
            start_powerSGD_iter=self.start_step,
            min_compression_rate=self.min_rate,  # pyright: ignore[reportArgumentType]
            orthogonalization_epsilon=ORTHOGONALIZATION_EPSILON,  # pyright: ignore[reportArgumentType]
            random_seed=self.seed % 2**32,  # NumPy's range
        )

    def exchange(self, state: None, bucket: dist.GradBucket) -> Future[Tensor]:
        traffic = self.compressed if self.state.iter >= self.start_step else self.whole
        self.group.traffic = traffic
        _count(traffic, bucket)
        self._check(bucket)
        future = powerSGD_hook(self.state, bucket)
        if self.device_type == "cpu":
            # The hook issues all-reduces from callbacks. On CUDA they run at once, in this thread; gloo runs them in
            # its own, whose order differs from rank to rank as soon as two buckets are under way.
            future.wait()
        return future

    def _check(self, bucket: dist.GradBucket) -> None:
        error = self.state.error_dict.get(bucket.index())
        if error is not None and error.numel() != bucket.buffer().numel():
            raise UsageError(
                "the checkpoint's PowerSGD state belongs to buckets of another size: keep opt.ddp.bucket_cap_mib as it "
                "was, or start a new run"
            )

    def state_dict(self) -> dict[str, Any]:
        # Not the random generator: with warm start, Q is drawn once for all buckets, in the first compressed step.
        s = self.state
        return {"step": s.iter, "errors": s.error_dict, "p": s.p_memory_dict, "q": s.q_memory_dict}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.state.iter = state["step"]
        kept = {"errors": self.state.error_dict, "p": self.state.p_memory_dict, "q": self.state.q_memory_dict}
        for name, buckets in kept.items():
            buckets.update({index: tensor.to(self.device_type) for index, tensor in state[name].items()})


def _count(traffic: Traffic, bucket: dist.GradBucket) -> None:
    traffic.gradients += bucket.buffer().nbytes
    traffic.steps += bucket.is_last()
