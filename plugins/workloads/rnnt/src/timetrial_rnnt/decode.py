"""Greedy decoding of a batch of utterances in lockstep.

Letters: B utterances, T frames, J width of the joint network, W frames looked at together, L layers, P their width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from timetrial_rnnt.layers import Joint, Prediction

WINDOW = 8
"""Frames whose best classes are computed together: most are the blank, which does not move the prediction network."""


def greedy(
    prediction: Prediction,
    joint: Joint,
    encoded_BTJ: Tensor,
    lengths: Tensor,
    max_symbols: int,
    max_per_frame: int,
) -> tuple[Tensor, Tensor]:
    """At each frame the most probable class: a label is emitted and the frame looked at again, the blank ends it
    (Graves 2012, arXiv:1211.3711, section 2.5, with a beam of one).

    Each utterance is at its own frame. In each turn it looks at the `WINDOW` frames from there on, goes to the
    first one that is not blank and emits its label, or skips all. It ends after its last frame, `lengths` [B],
    or after `max_symbols` labels; after `max_per_frame` labels a frame is left. Returns labels [B, max_symbols] int64,
    filled up with the blank, and how many there are, [B] int64. What is decoded beside an utterance does not change it.
    """
    size, frames, _ = encoded_BTJ.shape
    device, rows = encoded_BTJ.device, torch.arange(encoded_BTJ.shape[0], device=encoded_BTJ.device)
    symbols = torch.full((size, max_symbols), joint.blank, device=device)
    counts, at, here = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(3))
    ahead = torch.arange(WINDOW, device=device)
    output, state = prediction.rnn(encoded_BTJ.new_zeros(size, 1, prediction.embed.embedding_dim))
    predicted = joint.predictor_projection(output)
    while True:
        active = (at < lengths) & (counts < max_symbols)
        if not active.any():
            return symbols, counts
        window = at[:, None] + ahead
        seen = encoded_BTJ[rows[:, None], window.clamp(max=frames - 1)]
        best = joint(seen, predicted)[:, :, 0].argmax(-1)
        is_label = (best != joint.blank) & (window < lengths[:, None]) & active[:, None]
        emits, first = is_label.any(1), is_label.int().argmax(1)
        label = torch.where(emits, best[rows, first], 0)
        here = torch.where(emits, torch.where(first == 0, here, 0) + 1, 0)
        full = here >= max_per_frame
        at = torch.where(active, at + torch.where(emits, first + full, WINDOW), at)
        here = torch.where(full, 0, here)
        end = counts.clamp(max=max_symbols - 1)
        symbols[rows, end] = torch.where(emits, label, symbols[rows, end])
        counts = counts + emits
        output, after = prediction.rnn(prediction.embed(label)[:, None], state)
        state = tuple(torch.where(emits[:, None], new, old) for new, old in zip(after, state, strict=True))
        predicted = torch.where(emits[:, None, None], joint.predictor_projection(output), predicted)
