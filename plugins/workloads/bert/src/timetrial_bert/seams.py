"""Where opts may act on BERT. Imports without torch.

A batch, as it is offered to the opts' `transform`, is described in `timetrial_bert.batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

_LAYER = "network.bert.encoder.layer.*"
TENSOR_PARALLEL: Mapping[str, str] = {
    f"{_LAYER}.attention.self.num_attention_heads": "divide",
    f"{_LAYER}.attention.self.query": "column",
    f"{_LAYER}.attention.self.key": "column",
    f"{_LAYER}.attention.self.value": "column",
    f"{_LAYER}.attention.output.dense": "row",
    f"{_LAYER}.intermediate.dense": "column",
    f"{_LAYER}.output.dense": "row",
}
"""What is offered at `core.api.seams.TENSOR_PLAN`: each rank computes some of the heads, and some of the inner features
of the feed-forward part (Shoeybi et al. 2019, arXiv:1909.08053, section 3)."""

TENSOR_PARALLEL_DROPOUT: Mapping[str, str] = {f"{_LAYER}.attention.self": "random"}
"""The same with dropout: that of the attention is drawn for each head, all other for whole hidden states."""
