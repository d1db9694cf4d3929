"""Where opts may act on BERT. Imports without torch.

A batch, as it is offered to the opts' `transform`, is described in `timetrial_bert.batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from core.api.seams import Seam

if TYPE_CHECKING:
    from torch import Tensor

    MaskedLMLoss = Callable[..., tuple[Tensor, Tensor | None]]

ENCODER: Seam[Callable[[Any, dict[str, Tensor]], tuple[Tensor, Tensor]]] = Seam("bert.encoder")
"""`encode(bert, data)`: hidden states at the masked positions and at [CLS]; see `timetrial_bert.model.encode`."""

MLM_LOSS: Seam[MaskedLMLoss] = Seam("bert.mlm_loss")
"""Projection to the vocabulary and cross-entropy, summed over positions; see `timetrial_bert.model.mlm_loss`."""

PADDED = frozenset(
    {"input_ids", "token_type_ids", "attention_mask", "masked_positions", "masked_labels", "next_sentence_labels"}
)
"""Keys of a batch in its padded form: a `transform` that lays it out otherwise replaces them."""

IGNORED = -100
"""Label of a prediction that does not exist: it fills up rows with fewer predictions than there is room for."""
