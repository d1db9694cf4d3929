"""The encoder over one long row of sequences, each of which attends only to itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from timetrial_unpad.attention import attention

NAME = "timetrial_unpad"
"""Of the attention below among transformers' attention functions."""


class Encoder:
    """At the seam ENCODER. An unpadded batch is recognised by its `cu_seqlens`; a padded one goes to `inner`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.unpadded = self.padded = False
        """Whether such batches have been computed. Flags, since compiled code would be specialised to a count."""
        self.kernel = ""
        """How attention was computed, of the last batch."""

    def __call__(self, bert: Any, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`(BertModel, data) -> (hidden [N, H] at the masked tokens, [B, H] at [CLS])`."""
        if "cu_seqlens" not in data:
            self.padded = True
            return self.inner(bert, data)
        # Set for good: activation checkpointing calls the layers again, in the backward pass.
        bert.config._attn_implementation = NAME
        self.unpadded = True
        hidden_1TH = bert.embeddings(
            input_ids=data["input_ids"], token_type_ids=data["token_type_ids"], position_ids=data["position_ids"]
        )
        hidden_TH = bert.encoder(
            hidden_1TH, cu_seqlens=data["cu_seqlens"], longest=data["longest"], note=self._note
        ).last_hidden_state[0]
        picked = hidden_TH.index_select(0, data["picked"])
        masked = len(data["masked_labels"])
        return picked[:masked], picked[masked:]

    def _note(self, kernel: str) -> None:
        self.kernel = kernel


def _attention(
    module: Any,
    q_1ATD: Tensor,
    k_1ATD: Tensor,
    v_1ATD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function; A heads of size D. Result [1, T, A, D]."""
    if "cu_seqlens" not in more:  # a padded batch, from the workload's own encoder
        return sdpa_attention_forward(module, q_1ATD, k_1ATD, v_1ATD, attention_mask, dropout, scaling)
    q_TAD, k_TAD, v_TAD = (t.transpose(1, 2)[0] for t in (q_1ATD, k_1ATD, v_1ATD))
    result_TAD, kernel = attention(q_TAD, k_TAD, v_TAD, more["cu_seqlens"], more["longest"], dropout, scaling)
    more["note"](kernel)
    return result_TAD[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it, transformers would make no mask for padded batches
