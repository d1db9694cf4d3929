"""A batch of padded rows, and the same batch with several sequences in a row.

B sequences, S positions of a row, P predictions of a sequence; packed: R rows of W positions, N predictions in all.

    padded                               packed
    input_ids, token_type_ids  [B, S]    [R, W]
    attention_mask             [B, S]    segments [R, W]: the number of the sequence in its row, from 1; 0: free
                                         position_ids [R, W]: the position of each token in its own sequence
    masked_positions           [B, P]    picked [N + B]: places among the R * W positions of the masked tokens, then of
                                         each [CLS], in the order of the padded batch
    masked_labels              [B, P]    [N]
    next_sentence_labels       [B]       [B]

Everything else is handed on. A batch is packed by itself: each step consumes the examples that it would have without.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timetrial_bert.seams import IGNORED, PADDED


@dataclass
class Counts:
    """What went through `pack`, training and evaluation together."""

    batches: int = 0
    sequences: int = 0
    rows: int = 0
    tokens: int = 0
    positions: int = 0
    """Of the packed rows."""
    padded_positions: int = 0
    """Of as many rows as sequences."""
    most_in_a_row: int = 0


def best_fit(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """(row, first position) of each sequence: the longest first, each where it leaves the least room.

    Best-fit decreasing: at most 11/9 of the fewest possible rows, plus 4 (Johnson 1973). What Krell et al. (2021,
    arXiv:2107.02027) do with the lengths of a whole data set, for one batch.
    """
    room: list[tuple[int, int]] = []  # (free positions, row), sorted
    places, rows = [(0, 0)] * len(lengths), 0
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fitting = bisect_left(room, (lengths[number], -1))
        if fitting == len(room):
            free, row, rows = width, rows, rows + 1
        else:
            free, row = room.pop(fitting)
        places[number] = row, width - free
        insort(room, (free - lengths[number], row))
    return places


def narrowest(lengths: Sequence[int], width: int, multiple: int) -> tuple[list[tuple[int, int]], int]:
    """The places of `best_fit` in rows of at most `width`, and the width: the smallest multiple of `multiple` that a
    binary search finds to need no more rows. A last row that would be half empty makes all rows shorter instead."""
    places = best_fit(lengths, width)
    rows = _rows(places)
    low, high = -(-max(max(lengths), -(-sum(lengths) // rows)) // multiple), -(-width // multiple)
    while low < high:
        middle = (low + high) // 2
        tried = best_fit(lengths, middle * multiple)
        if _rows(tried) <= rows:
            places, width, high = tried, middle * multiple, middle
        else:
            low = middle + 1
    return places, width


def _rows(places: Sequence[tuple[int, int]]) -> int:
    return 1 + max(row for row, _ in places)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What sizes are filled up to multiples of, so that fewer different shapes occur; 1 for not at all."""

    rows: int = 1
    length: int = 1
    predictions: int = 1


def pack(data: dict[str, Any], rounding: Rounding, counts: Counts | None = None) -> dict[str, Any]:
    """The batch packed; see the head of this file. On the host, unless the data is on a device already."""
    mask_BS, labels_BP = data["attention_mask"], data["masked_labels"]
    sequences, length = mask_BS.shape
    places, width = narrowest(mask_BS.sum(1).tolist(), length, rounding.length)
    used = _rows(places)
    rows = used + -used % rounding.rows
    numbers, in_row = [0] * sequences, [0] * used
    for number in sorted(range(sequences), key=places.__getitem__):
        in_row[places[number][0]] += 1
        numbers[number] = in_row[places[number][0]]

    starts_B = torch.tensor([row * width + start for row, start in places], device=mask_BS.device)
    places_T = (starts_B[:, None] + torch.arange(length, device=mask_BS.device))[mask_BS]
    labelled = labels_BP != IGNORED
    labels_N = labels_BP[labelled]
    masked_N = (data["masked_positions"] + starts_B[:, None])[labelled]
    unlabelled = -len(labels_N) % rounding.predictions
    if counts is not None:
        counts.batches += 1
        counts.sequences += sequences
        counts.rows += rows
        counts.tokens += len(places_T)
        counts.positions += rows * width
        counts.padded_positions += sequences * length
        counts.most_in_a_row = max(counts.most_in_a_row, *in_row)

    def spread(values_BS: Tensor) -> Tensor:
        return values_BS.new_zeros(rows * width).index_copy_(0, places_T, values_BS[mask_BS]).view(rows, width)

    return {
        **{key: value for key, value in data.items() if key not in PADDED},
        "input_ids": spread(data["input_ids"]),
        "token_type_ids": spread(data["token_type_ids"]),
        "position_ids": spread(torch.arange(length, device=mask_BS.device).expand(sequences, -1)),
        "segments": spread(torch.tensor(numbers, device=mask_BS.device)[:, None].expand(-1, length)),
        "picked": torch.cat([F.pad(masked_N, (0, unlabelled)), starts_B]),
        "masked_labels": F.pad(labels_N, (0, unlabelled), value=IGNORED),
        "next_sentence_labels": data["next_sentence_labels"],
    }
