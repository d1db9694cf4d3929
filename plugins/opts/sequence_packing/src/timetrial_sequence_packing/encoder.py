"""The encoder over packed rows: a token attends only to those of its own sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Encoder:
    """At the seam ENCODER. A packed batch is recognised by its `segments`; a padded one goes to `inner`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.packed = self.padded = False
        """Whether such batches have been computed. Flags, since compiled code would be specialised to a count."""

    def __call__(self, bert: Any, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`(BertModel, data) -> (hidden [N, H] at the masked tokens, [B, H] at [CLS])`."""
        if "segments" not in data:
            self.padded = True
            return self.inner(bert, data)
        self.packed = True
        hidden_RSH = bert.embeddings(
            input_ids=data["input_ids"], token_type_ids=data["token_type_ids"], position_ids=data["position_ids"]
        )
        mask_R1SS = block_diagonal(data["segments"], hidden_RSH.dtype)
        hidden_RSH = bert.encoder(hidden_RSH, attention_mask=mask_R1SS).last_hidden_state
        picked = hidden_RSH.flatten(0, 1).index_select(0, data["picked"])
        masked = len(data["masked_labels"])
        return picked[:masked], picked[masked:]


def block_diagonal(segments_RS: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1, S, S], to be added to the scores: 0 where two positions are of one sequence, hugely negative elsewhere.

    Free positions are a sequence, too, so that each attends to something. Half of the most negative number: a score
    added to it stays finite, also after autocast's rounding to bfloat16; its exponential is 0 all the same.
    """
    same_R1SS = segments_RS[:, None, :, None] == segments_RS[:, None, None, :]
    return torch.zeros_like(same_R1SS, dtype=dtype).masked_fill_(~same_R1SS, torch.finfo(dtype).min / 2)
