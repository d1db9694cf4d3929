"""The residual policy-value network of the v1.1 reference, in any size, and reading one back from a run folder.

Source: mlcommons/training, reinforcement/tensorflow/minigo/dual_net.py, model_inference_fn (AlphaGo Zero, Silver et al.
2017, Methods).

Letters: N positions, C input planes, S board size, P = S * S points, A = P + 1 moves (the last is the pass).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from core.api.errors import UsageError

BATCH_NORM_MOMENTUM = 0.05
"""Weight of a new batch in the running statistics; the reference's momentum of 0.95 weighs the old ones."""
BATCH_NORM_EPSILON = 1e-5
"""Reference: likewise."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    board: int
    history: int
    width: int
    blocks: int
    policy_channels: int
    value_channels: int
    value_hidden: int


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training run over all ranks' examples, which must be equally many; torch's
    SyncBatchNorm does the same, but only on an accelerator. Parameters and buffers are those of `nn.BatchNorm2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        ranks, dims = dist.get_world_size(), (0, 2, 3)
        # The gradient of all_reduce is all_reduce: each rank's statistics receive the gradients of all ranks' losses.
        mean = all_reduce(input.mean(dims)) / ranks
        centred = input - mean.view(1, -1, 1, 1)
        variance = all_reduce(centred.square().mean(dims)) / ranks
        normalised = centred * (variance + self.eps).rsqrt().view(1, -1, 1, 1)
        count = input.numel() // input.shape[1] * ranks
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        if not self.affine:
            return normalised
        return normalised * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def batch_norm(sync: bool, device: torch.device) -> Callable[..., nn.Module]:
    """Makes a normalisation layer for a number of channels. `sync`: over the global batch, not this rank's share."""
    kind = nn.BatchNorm2d if not sync else SyncBatchNorm2d if device.type == "cpu" else nn.SyncBatchNorm
    return lambda channels, affine=True: kind(channels, BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM, affine)


Norm = Callable[..., nn.Module]


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)


class Block(nn.Module):
    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = _convolution(width, width, 3), norm(width)
        self.conv2, self.norm2 = _convolution(width, width, 3), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class PolicyValueNet(nn.Module):
    """planes [N, C, S, S] float -> (logits [N, A], value [N] from -1 to 1, for the player to move)."""

    def __init__(self, sizes: Sizes, norm: Norm) -> None:
        super().__init__()
        self.sizes, points = sizes, sizes.board**2
        self.conv, self.norm = _convolution(2 * sizes.history + 1, sizes.width, 3), norm(sizes.width)
        self.blocks = nn.Sequential(*(Block(sizes.width, norm) for _ in range(sizes.blocks)))
        self.policy_conv = _convolution(sizes.width, sizes.policy_channels, 1)
        self.policy_norm = norm(sizes.policy_channels, affine=False)
        self.policy = nn.Linear(sizes.policy_channels * points, points + 1)
        self.value_conv = _convolution(sizes.width, sizes.value_channels, 1)
        self.value_norm = norm(sizes.value_channels, affine=False)
        self.value_hidden = nn.Linear(sizes.value_channels * points, sizes.value_hidden)
        self.value = nn.Linear(sizes.value_hidden, 1)

    def forward(self, planes_NCSS: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(F.relu(self.norm(self.conv(planes_NCSS))))
        logits = self.policy(F.relu(self.policy_norm(self.policy_conv(x))).flatten(1))
        hidden = F.relu(self.value_hidden(F.relu(self.value_norm(self.value_conv(x))).flatten(1)))
        return logits, torch.tanh(self.value(hidden)).squeeze(1)


@torch.no_grad()
def initialise(model: PolicyValueNet, generator: torch.Generator) -> None:
    """Weights uniform with variance 2 / (fan-in + fan-out), biases 0: the reference's, which are TensorFlow's defaults
    (Glorot and Bengio 2010)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def parameter_groups(model: PolicyValueNet, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: weights and scales, which decay; biases and shifts, which do not (reference: reg_vars)."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]


def closed_names(blocks: int) -> list[str]:
    """The tensors as the closed rules spell them (TensorFlow's names in order of creation), by number of blocks."""
    trunk = 1 + 2 * blocks

    def numbered(kind: str, number: int) -> str:
        return f"{kind}_{number}" if number else kind

    names: list[str] = []
    for number in range(trunk):
        names += [f"{numbered('conv2d', number)}/kernel"]
        names += [f"{numbered('batch_normalization', number)}/{part}" for part in ("gamma", "beta")]
    for head, dense in ((trunk, (0,)), (trunk + 1, (1, 2))):
        names.append(f"{numbered('conv2d', head)}/kernel")
        names += [f"{numbered('dense', number)}/{part}" for number in dense for part in ("kernel", "bias")]
    return [*names, "global_step"]


# --------------------------------------------------------------------------------------------------- reading one back

_IN_CHECKPOINT = "shared/model/"
"""What core puts before the names of the model's tensors in a checkpoint's shared.safetensors."""


def read(place: Path) -> PolicyValueNet:
    """The network in `place`, in evaluation mode on the CPU: a run folder of this project (its newest checkpoint), or a
    safetensors file, as in a checkpoint or with the bare names of `PolicyValueNet.state_dict()`. The sizes are those of
    the tensors. UsageError where there is none."""
    file = place
    if place.is_dir():
        file = max(place.glob("checkpoints/step_*/shared.safetensors"), default=place)
    if not file.is_file():
        raise UsageError(
            f"no trained network at {place}: expected a run folder with a checkpoint, or a safetensors file"
        )
    try:
        tensors = safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise UsageError(f"{file} is not a safetensors file: {error}") from None
    inside = {n.removeprefix(_IN_CHECKPOINT): t for n, t in tensors.items() if n.startswith(_IN_CHECKPOINT)}
    return _rebuilt(inside or tensors, file)


def _rebuilt(tensors: Mapping[str, Tensor], file: Path) -> PolicyValueNet:
    try:
        width, planes = tensors["conv.weight"].shape[:2]
        channels = tensors["policy_conv.weight"].shape[0]
        sizes = Sizes(
            board=round((tensors["policy.bias"].shape[0] - 1) ** 0.5),
            history=(planes - 1) // 2,
            width=width,
            blocks=len({match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}),
            policy_channels=channels,
            value_channels=tensors["value_conv.weight"].shape[0],
            value_hidden=tensors["value.weight"].shape[1],
        )
        model = PolicyValueNet(sizes, batch_norm(False, torch.device("cpu")))
        model.load_state_dict(dict(tensors))
    except (KeyError, ValueError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise UsageError(
            f"{file} does not hold a network of timetrial-minigo: {what}; give the folder of a minigo run"
        ) from None
    return model.eval()
