"""Batch normalisation over the global batch, on any device.

torch's SyncBatchNorm does the same, but only on an accelerator; a run on CPU ranks needs this one.

Letters: C channels, N images x height x width (of one rank, or of all).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _GlobalBatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * gamma + beta, with mean and biased var over all ranks' x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = (0, 2, 3)
        x64 = x.double()  # E[x^2] - E[x]^2 loses in float32 the digits that it keeps in float64
        sums = torch.cat([x64.sum(dims), x64.square().sum(dims), x64.new_tensor([x.numel() / x.shape[1]])])
        dist.all_reduce(sums)
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        variance = (square - mean.square()).clamp_min(0)
        mean, inv_std = mean.to(gamma.dtype), (variance + eps).rsqrt().to(gamma.dtype)
        ctx.save_for_backward(x, gamma, mean, inv_std, count)
        scale = gamma * inv_std
        y = x * _per_channel(scale) + _per_channel(beta - mean * scale)
        unbiased = (variance * count / (count - 1).clamp_min(1)).to(gamma.dtype)
        ctx.mark_non_differentiable(mean, unbiased, count)
        return y.to(x.dtype), mean, unbiased, count

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        """Ioffe and Szegedy (2015), section 3: the means in dx run over the global batch; gamma's and beta's gradients
        stay local, because the gradient exchange sums them with all others."""
        dy: Tensor = gradients[0]
        x, gamma, mean, inv_std, count = ctx.saved_tensors
        dims = (0, 2, 3)
        normalised = (x - _per_channel(mean)) * _per_channel(inv_std)
        dbeta, dgamma = dy.sum(dims), (dy * normalised).sum(dims)
        sums = torch.cat([dbeta, dgamma]).double()
        dist.all_reduce(sums)
        mean_dy, mean_dy_x = (sums / count).to(gamma.dtype).chunk(2)
        dx = (dy - _per_channel(mean_dy) - normalised * _per_channel(mean_dy_x)) * _per_channel(gamma * inv_std)
        return dx.to(x.dtype), dgamma.to(gamma.dtype), dbeta.to(gamma.dtype), None


def _per_channel(values_C: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics run over all ranks' images, which may be unequally many.

    Parameters, buffers and running statistics are those of `nn.BatchNorm2d`, which it is outside training and where
    there is one rank.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        y, mean, variance, _ = _GlobalBatchNorm.apply(input, self.weight, self.bias, self.eps)  # pyright: ignore
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y


def batch_norm(sync: bool, device: torch.device) -> Callable[[int], nn.Module]:
    """Makes a normalisation layer for a number of channels. `sync`: over the global batch, not this rank's share."""
    if not sync:
        return nn.BatchNorm2d
    return SyncBatchNorm2d if device.type == "cpu" else nn.SyncBatchNorm
