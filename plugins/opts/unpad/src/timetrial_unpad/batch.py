"""A padded batch, and the same batch without padding.

B sequences, S positions of a padded row, P predictions of a row; T tokens and N predictions of the whole batch.

    padded                               unpadded
    input_ids, token_type_ids  [B, S]    [1, T] each, the sequences one after the other, the longest first
    attention_mask             [B, S]    cu_seqlens [B + 1] int32: where each sequence begins, and the end
                                         position_ids [1, T]: the position of each token in its own sequence
    masked_positions           [B, P]    picked [N + B]: places in the long row of the masked tokens, then of each [CLS]
    masked_labels              [B, P]    [N]
    next_sentence_labels       [B]       [B]
                                         longest: a bound on the length of every sequence; S, unless filling is longer

Everything else is handed on. Filling, where sizes are rounded up, is one more sequence at the end, of [PAD] tokens, and
predictions without a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timetrial_bert.seams import IGNORED, PADDED


@dataclass
class Counts:
    """What went through `unpad`, training and evaluation together."""

    batches: int = 0
    positions: int = 0
    """Of the padded rows."""
    tokens: int = 0
    filling: int = 0
    predictions: int = 0
    """That the padded rows have room for."""
    predicted: int = 0
    """Of these, the ones that have a label."""


def unpad(data: dict[str, Any], round_to: int = 1, counts: Counts | None = None) -> dict[str, Any]:
    """The batch without padding; see the head of this file. On the host, unless the data is on a device already."""
    mask_BS, labels_BP = data["attention_mask"], data["masked_labels"]
    rows, width = mask_BS.shape
    lengths_B, order_B = mask_BS.sum(1).sort(descending=True, stable=True)
    starts_B = F.pad(lengths_B.cumsum(0), (1, 0))
    kept_T = torch.arange(rows * width, device=mask_BS.device).view(rows, width)[order_B][mask_BS[order_B]]
    labelled = labels_BP[order_B] != IGNORED
    labels_N = labels_BP[order_B][labelled]
    masked_N = (data["masked_positions"][order_B] + starts_B[:-1, None])[labelled]

    tokens, predicted = len(kept_T), len(labels_N)
    filling, unlabelled = 0, -predicted % round_to
    if round_to > 1:  # at least one, so that the number of sequences stays, and none is empty: kernels want that
        filling = round_to - tokens % round_to
        starts_B = F.pad(starts_B, (0, 1), value=tokens + filling)
    if counts is not None:
        counts.batches += 1
        counts.positions += rows * width
        counts.tokens += tokens
        counts.filling += filling
        counts.predictions += labels_BP.numel()
        counts.predicted += predicted

    def row(values_BS: Tensor) -> Tensor:
        return F.pad(values_BS.reshape(-1)[kept_T], (0, filling))[None]

    return {
        **{key: value for key, value in data.items() if key not in PADDED},
        "input_ids": row(data["input_ids"]),
        "token_type_ids": row(data["token_type_ids"]),
        "position_ids": row(torch.arange(width, device=mask_BS.device).repeat(rows)),
        "cu_seqlens": starts_B.int(),
        "picked": torch.cat([F.pad(masked_N, (0, unlabelled)), starts_B[:rows]]),
        "masked_labels": F.pad(labels_N, (0, unlabelled), value=IGNORED),
        "next_sentence_labels": data["next_sentence_labels"][order_B],
        "longest": max(width, round_to),
    }
