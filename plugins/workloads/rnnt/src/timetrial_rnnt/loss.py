"""The transducer's loss as the baseline computes it: the seam "rnnt.loss"."""

from __future__ import annotations

from typing import Any

import torch
import torchaudio
from torch import Tensor


@torch.compiler.disable  # torchaudio's kernel cannot be traced
def transducer_loss(
    joint: Any, encoded: Tensor, predicted: Tensor, labels: Tensor, encoded_lengths: Tensor, label_lengths: Tensor
) -> Tensor:
    """Negative log-likelihood in nats of each utterance's labels, summed over all alignments (Graves 2012,
    arXiv:1211.3711), shape [B].

    `joint` is a `timetrial_rnnt.layers.Joint`. encoded [B, T, J] and predicted [B, U+1, J] are already projected to its
    width; labels [B, U] int64, anything in range where it is padding; encoded_lengths [B] and label_lengths [B] int64.
    All of the logits [B, T, U+1, V] are computed, as torchaudio needs them.
    """
    frames, symbols = int(encoded_lengths.max()), int(label_lengths.max())
    logits_BTUV = joint(encoded[:, :frames], predicted[:, : symbols + 1])
    return torchaudio.functional.rnnt_loss(
        logits_BTUV.float(),
        labels[:, :symbols].to(torch.int32).contiguous(),
        encoded_lengths.to(torch.int32),
        label_lengths.to(torch.int32),
        blank=joint.blank,
        clamp=-1,
        reduction="none",
    )
