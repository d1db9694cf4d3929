"""The layout of a batch, and how examples become one.

`Batch.data` is a dictionary of tensors with static shapes. B is the rows of this rank, S `workload.sequence_length`, P
`workload.max_predictions`.

    input_ids             [B, S] int64     masked tokens in place; 0 in the padding
    token_type_ids        [B, S] int64     0 in the first sentence, 1 in the second, 0 in the padding
    attention_mask        [B, S] bool      True at tokens; padding comes only at the end of a row
    masked_positions      [B, P] int64     position in the row of each prediction; 0 where unused
    masked_labels         [B, P] int64     the token there; -100 where unused
    next_sentence_labels  [B]    int64     0: the second sentence follows the first; 1: it comes from elsewhere
    mlm_scale             [B]    float32   examples / predictions, both of the *global* batch: the same in every row
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from timetrial_bert.pairs import Example
from timetrial_bert.seams import IGNORED


def collate(examples: Sequence[Example], length: int, predictions: int, scale: float) -> dict[str, Tensor]:
    """The examples as one batch; see the head of this file. `scale` is `mlm_scale`'s value."""
    rows = len(examples)
    ids, types = np.zeros((rows, length), np.int64), np.zeros((rows, length), np.int64)
    mask = np.zeros((rows, length), np.bool_)
    positions, labels = np.zeros((rows, predictions), np.int64), np.full((rows, predictions), IGNORED, np.int64)
    for row, example in enumerate(examples):
        tokens, masked = len(example.input_ids), len(example.masked_positions)
        ids[row, :tokens] = example.input_ids
        types[row, example.second_start : tokens] = 1
        mask[row, :tokens] = True
        positions[row, :masked] = example.masked_positions
        labels[row, :masked] = example.masked_labels
    return {
        "input_ids": torch.from_numpy(ids),
        "token_type_ids": torch.from_numpy(types),
        "attention_mask": torch.from_numpy(mask),
        "masked_positions": torch.from_numpy(positions),
        "masked_labels": torch.from_numpy(labels),
        "next_sentence_labels": torch.tensor([int(example.random_next) for example in examples]),
        "mlm_scale": torch.full((rows,), scale),
    }
