"""How likely it is that the alignment passes through each cell of the transducer's lattice.

An alignment is a path from cell (t, u) = (0, 0): "blank" leads to (t + 1, u), the label u to (t, u + 1), and the blank
at (T - 1, U) ends it. Graves, "Sequence Transduction with Recurrent Neural Networks", arXiv:1211.3711, section 2.4.

Letters: B utterances, T frames, U labels, W = U + 1 places between labels, N cells, D anti-diagonals t + u = constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cells:
    """The cells that are computed, in a packed list, padding left out. A path leads through these only.

    A cell's number is its place in a (B, T, W) tensor: (b T + t) W + u. Lengths are int64 on the device, shape (B,).
    """

    number_N: Tensor
    frames: int
    places: int
    frames_B: Tensor
    labels_B: Tensor

    def __len__(self) -> int:
        return len(self.number_N)

    @property
    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Utterance, frame and place of each cell, each int64 (N,)."""
        row_N = self.number_N // self.places
        return row_N // self.frames, row_N % self.frames, self.number_N % self.places


def all_cells(frames: int, places: int, frames_B: Tensor, labels_B: Tensor) -> Cells:
    """Every frame and every place of each utterance, and nothing of the padding. The host waits for their number."""
    frame_T, place_W = (torch.arange(n, device=frames_B.device) for n in (frames, places))
    used_BTW = (frame_T < frames_B[:, None])[:, :, None] & (place_W <= labels_B[:, None])[:, None]
    return Cells(used_BTW.flatten().nonzero().squeeze(1), frames, places, frames_B, labels_B)


def descend(scores_DC: Tensor, arrows_D2C: Tensor, places: int) -> None:
    """Fills the rows of `scores_DC` from the first one on, which `posteriors` explains, and adds to each arrow's
    log-probability the score that it comes from. Column 0 stands left of the first; `places` columns are a lattice."""
    windows_D2C = scores_DC.unfold(1, arrows_D2C.shape[2], 1)  # a row beside itself, shifted by one
    for arrows_2C, window_2C, below_C in zip(arrows_D2C, windows_D2C, scores_DC[1:, 1:], strict=False):
        arrows_2C += window_2C  # from the left by a label, from above by a blank
        torch.logaddexp(*arrows_2C, out=below_C)


def posteriors(
    blank_N: Tensor, label_N: Tensor, cells: Cells, recursion: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihood (B,) of the labels, and the probabilities (N,) that the path leaves a cell by its blank or label.

    `blank_N` and `label_N` are log-probabilities; at an utterance's last place, the label's is not used. All results
    are float64: a sum of hundreds of logarithms in float32 has lost the digits that its exponential needs. Where no
    path has a probability, the log-likelihood is -inf and the posteriors are NaN.

    Forward and backward variables are one recursion, since the lattice read from its end is a lattice too: the second
    half of the columns below holds the mirror images. A row of the tables is an anti-diagonal; the cell (t, u) of
    utterance b lies in row t + u, column b W + u, so that both of its predecessors lie in the row above, one straight
    above it and one to the left. What is never written stays -inf, and so bounds each utterance's own lattice.
    """
    utterance_N, frame_N, place_N = cells.coordinates
    blank_N = blank_N.double()
    label_N = label_N.double().masked_fill_(place_N == cells.labels_B[utterance_N], -torch.inf)
    batch, width = len(cells.frames_B), len(cells.frames_B) * cells.places
    end_B = cells.frames_B + cells.labels_B
    rows = cells.frames + cells.places  # at least one more than the longest path has steps
    row_N, column_N = frame_N + place_N, utterance_N * cells.places + place_N
    # The mirror image of the arrow that leaves (t, u) arrives at the image of (t, u).
    back_N = end_B[utterance_N] - 1 - row_N
    back_column_N = width + column_N - 2 * place_N + cells.labels_B[utterance_N]

    arrows_D2C = blank_N.new_full((rows - 1, 2, 2 * width), -torch.inf)
    by_label_DC, by_blank_DC = arrows_D2C.unbind(1)
    by_blank_DC[row_N, column_N] = blank_N
    by_label_DC[row_N, column_N + 1] = label_N
    by_blank_DC[back_N, back_column_N] = blank_N
    by_label_DC[back_N, back_column_N] = label_N

    scores_DC = arrows_D2C.new_full((rows, 1 + 2 * width), -torch.inf)
    first_B = torch.arange(batch, device=blank_N.device) * cells.places
    scores_DC[0, 1 + first_B] = scores_DC[0, 1 + width + first_B] = 0
    if recursion == "triton":
        from timetrial_lean_transducer.kernel import descend as descend_on_gpu

        descend_on_gpu(scores_DC, arrows_D2C, cells.places)
    else:
        descend(scores_DC, arrows_D2C, cells.places)

    likelihood_B = scores_DC[end_B, 1 + first_B + cells.labels_B]
    until_N = scores_DC[row_N, 1 + column_N] - likelihood_B[utterance_N]
    by_blank_N = by_blank_DC[back_N, back_column_N].add_(until_N).exp_()
    by_label_N = by_label_DC[back_N, back_column_N].add_(until_N).exp_()
    return likelihood_B, by_blank_N, by_label_N
