"""The component "rnnt.loss": exact, or pruned.

Letters: B utterances, T frames, U labels, W = U + 1 places, J width of the joint, V vocabulary, N cells.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timetrial_lean_transducer.joint import JointLoss, Settings, Work
from timetrial_lean_transducer.lattice import Cells, all_cells
from timetrial_lean_transducer.memory import PeakMemory
from timetrial_lean_transducer.pruning import PathLoss, first_places, least_span, pruned, simple_scores

CPU_CHUNK, CHUNK = 512, 32768
"""Cells of a chunk: on a CPU small enough for its caches, elsewhere large enough to fill the device."""


class LeanLoss:
    """`loss(joint, encoded, predicted, labels, encoded_lengths, label_lengths)`, as the workload documents the seam.

    With a `span`, only so many places of each frame go through the joint network, and the simple joint's loss is added,
    scaled by `simple_scale`. Products run in autocast's dtype where it is on, all else in float32, or float64 if the
    inputs are.
    """

    def __init__(
        self, *, chunk: int | None = None, negligible: float = 0.0, span: int | None = None, simple_scale: float = 0.5
    ) -> None:
        self.chunk, self.negligible, self.span, self.simple_scale = chunk, negligible, span, simple_scale
        self.work = Work()
        self.logits_bytes = 0
        """What all logits of the first call for training take; their gradients take as much again."""
        self.widened = 0
        """Calls in which `span` places left some utterance no path, so that more were taken."""
        self.dropout = False
        """Whether it has drawn dropout masks: others than the plain joint network draws."""

    @torch.compiler.disable  # its chunks would be unrolled into one graph, and there is nothing to fuse around them
    def __call__(
        self,
        joint: Any,
        encoded: Tensor,
        predicted: Tensor,
        labels: Tensor,
        encoded_lengths: Tensor,
        label_lengths: Tensor,
    ) -> Tensor:
        """Negative log-likelihoods (B,) in nats, float32 (float64 for float64 inputs).

        `encoded` (B, T, J), `predicted` (B, U + 1, J), `labels` (B, U) int64 with any padding, lengths (B,) int64;
        `joint` has the modules `dropout` and `output` (linear, with bias) and the number `blank`.
        """
        device, wide = encoded.device.type, torch.promote_types(encoded.dtype, torch.float32)
        dropout = joint.dropout.p if joint.dropout.training else 0.0
        settings = Settings(
            blank=joint.blank, chunk=self.chunk or (CPU_CHUNK if device == "cpu" else CHUNK), dropout=dropout,
            # From the host's generator, which checkpoints carry.
            negligible=self.negligible, seed=int(torch.randint(2**62, ())) if dropout else 0, wide=wide,
            low=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else encoded.dtype,
        )  # fmt: skip
        places = torch.arange(predicted.shape[1], device=labels.device)
        targets_BW = F.pad(labels, (0, 1)).masked_fill(places >= label_lengths[:, None], 0)
        inputs = (encoded, predicted, joint.output.weight, joint.output.bias, targets_BW)
        training = torch.is_grad_enabled()
        memory = PeakMemory() if training and not self.logits_bytes else None
        if training:
            self.dropout |= dropout > 0
            self.logits_bytes = (
                self.logits_bytes or encoded[:, :, 0].numel() * len(places) * len(joint.output.bias) * wide.itemsize
            )
        with torch.autocast(device, enabled=False), memory or nullcontext():
            cells = all_cells(encoded.shape[1], len(places), encoded_lengths, label_lengths)
            simple_B, cells = (None, cells) if self.span is None else self._prune(inputs, cells, settings)
            work = self.work if training else Work()
            losses_B = JointLoss.apply(*inputs, cells, settings, work, memory)
            return losses_B if simple_B is None else losses_B + self.simple_scale * simple_B

    def _prune(self, inputs: tuple[Tensor, ...], cells: Cells, settings: Settings) -> tuple[Tensor, Cells]:
        """The simple joint's loss, and the cells that it leaves."""
        scores = simple_scores(*inputs, settings.blank, settings.low, settings.wide)
        blank_N, label_N = (t.flatten().index_select(0, cells.number_N) for t in scores)
        utterance_N, _, place_N = cells.coordinates
        label_N = label_N.masked_fill(place_N == cells.labels_B[utterance_N], -torch.inf)
        simple_B, *posteriors = PathLoss.apply(blank_N, label_N, cells)  # pyright: ignore[reportGeneralTypeIssues]
        size = (len(simple_B), cells.frames, cells.places)
        grids = [t.new_zeros(size).flatten().index_copy_(0, cells.number_N, t).view(size) for t in posteriors]
        span = max(self.span, least := least_span(cells))
        self.widened += self.span < least
        return simple_B, pruned(cells, first_places(*grids, span, cells.frames_B, cells.labels_B), span)
