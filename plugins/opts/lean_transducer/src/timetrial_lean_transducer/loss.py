"""The transducer loss: exact, or pruned.

Letters: B utterances, T frames, U labels, W = U + 1 places, J width of the joint, V vocabulary, N cells.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timetrial_lean_transducer.joint import Inputs, Settings, Work, joint_loss
from timetrial_lean_transducer.lattice import all_cells
from timetrial_lean_transducer.memory import PeakMemory
from timetrial_lean_transducer.pruning import least_span, prune

CPU_CHUNK_BYTES, CHUNK_BYTES = 2 * 2**20, 64 * 2**20
"""What a chunk's logits (or hidden values, where they are wider) may take: on a CPU, what its caches hold; elsewhere
enough to fill the device."""


class LeanLoss:
    """`loss(joint, encoded, predicted, labels, encoded_lengths, label_lengths)`, as the workload documents the seam.

    With a `span` above 0, only that many places of each frame go through the joint network, and the simple joint's loss
    is added, scaled by `simple_scale`. Products run in autocast's dtype where it is on, all else in float32, or float64
    if the inputs are.
    """

    def __init__(
        self, *, chunk: int | None = None, negligible: float = 0.0, span: int = 0, simple_scale: float = 0.5,
        recursion: str = "torch",
    ) -> None:  # fmt: skip
        self.chunk, self.negligible, self.span, self.simple_scale = chunk, negligible, span, simple_scale
        self.recursion = recursion
        self.work = Work()
        self.logits_bytes = 0
        """What all logits of the first call for training take; their gradients take as much again."""
        self.widened = 0
        """Calls in which `span` places left some utterance no path, so that more were taken."""
        self.dropout = False
        """Whether it has drawn dropout masks: others than the plain joint network draws."""

    @torch.compiler.disable  # its chunks would be unrolled into one graph, and there is nothing to fuse around them
    def __call__(
        self, joint: Any, encoded: Tensor, predicted: Tensor, labels: Tensor,
        encoded_lengths: Tensor, label_lengths: Tensor,
    ) -> Tensor:  # fmt: skip
        """Negative log-likelihoods (B,) in nats, float32 (float64 for float64 inputs).

        `encoded` (B, T, J), `predicted` (B, U + 1, J), `labels` (B, U) int64 with any padding, lengths (B,) int64;
        `joint` has the modules `dropout` and `output` (linear, with bias) and the number `blank`, and for pruning
        `simple`, a SimpleJoint.
        """
        padding_BW = torch.arange(predicted.shape[1], device=labels.device) >= label_lengths[:, None]
        targets_BW = F.pad(labels, (0, 1)).masked_fill(padding_BW, 0)
        inputs = Inputs(encoded, predicted, joint.output.weight, joint.output.bias, targets_BW)
        settings = self._settings(joint, encoded)
        work, memory = self.work, None
        if not torch.is_grad_enabled():
            work = Work()  # evaluation is not counted
        elif not self.logits_bytes:
            self.logits_bytes = padding_BW.numel() * encoded.shape[1] * len(inputs.bias_V) * settings.wide.itemsize
            memory = PeakMemory()
        with memory or nullcontext():
            simple = joint.simple(encoded, predicted) if self.span else None  # under autocast, as any layer
            with torch.autocast(encoded.device.type, enabled=False):
                cells = all_cells(encoded.shape[1], predicted.shape[1], encoded_lengths, label_lengths)
                if simple is None:
                    return joint_loss(inputs, cells, settings, work, memory)
                span = max(self.span, least_span(cells))
                self.widened += span > self.span
                simple_B, cells = prune(simple, targets_BW, cells, span, settings)
                return joint_loss(inputs, cells, settings, work, memory) + self.simple_scale * simple_B

    def _settings(self, joint: Any, encoded: Tensor) -> Settings:
        device = encoded.device.type
        room = CPU_CHUNK_BYTES if device == "cpu" else CHUNK_BYTES
        dropout = joint.dropout.p if joint.dropout.training else 0.0
        self.dropout |= dropout > 0
        return Settings(
            blank=joint.blank,
            chunk=self.chunk or max(1, room // (4 * max(joint.output.weight.shape))),
            negligible=self.negligible,
            dropout=dropout,
            seed=int(torch.randint(2**62, ())) if dropout else 0,  # the host's generator, which checkpoints carry
            low=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else encoded.dtype,
            wide=torch.promote_types(encoded.dtype, torch.float32),
            recursion=self.recursion,
        )
