"""Where opts may act on RNN-T. Imports without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from core.api.seams import Seam

if TYPE_CHECKING:
    from torch import Tensor

    TransducerLoss = Callable[[Any, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

TRANSDUCER_LOSS: Seam[TransducerLoss] = Seam("rnnt.loss")
"""`loss(joint, encoded, predicted, labels, encoded_lengths, label_lengths)`, the joint network included; see
`timetrial_rnnt.loss.transducer_loss`."""

JOINT = "joint"
"""Name of the joint network in the model: it has the modules `dropout` and `output` (linear, with bias), and the number
`blank` of the blank symbol."""
