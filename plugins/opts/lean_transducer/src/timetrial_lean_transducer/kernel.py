"""The lattice's recursion as one Triton kernel: one launch instead of two for every anti-diagonal.

The tests run it in Triton's interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _descend(scores_ptr, arrows_ptr, rows, width, places, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program for each utterance and direction goes down the rows; its threads share a row through global memory."""
    place = tl.arange(0, BLOCK)
    column = tl.program_id(0) * places + place
    inside = place < places
    nothing = float("-inf")
    row = 0
    while row < rows - 1:  # a range would not do for the interpreter under numpy 2.4
        above = scores_ptr + row * (width + 1) + 1 + column
        by_label = arrows_ptr + 2 * row * width + column
        by_blank = by_label + width
        left_score = tl.load(above - 1, mask=inside & (place > 0), other=nothing)
        left = tl.load(by_label, mask=inside, other=nothing) + left_score
        straight = tl.load(by_blank, mask=inside, other=nothing) + tl.load(above, mask=inside, other=nothing)
        larger = tl.maximum(left, straight, propagate_nan=tl.PropagateNan.ALL)
        smaller = tl.minimum(left, straight, propagate_nan=tl.PropagateNan.ALL)
        below = smaller - tl.where(larger > nothing, larger, 0.0)  # no difference of infinities
        tl.store(by_label, left, mask=inside)
        tl.store(by_blank, straight, mask=inside)
        tl.store(above + width + 1, larger + tl.log(1 + tl.exp(below)), mask=inside)
        tl.debug_barrier()  # before the next row is read by other threads than wrote it
        row += 1


def descend(scores_DC: Tensor, arrows_D2C: Tensor, places: int) -> None:
    """As `lattice.descend`, of which it is another implementation."""
    rows, width = len(scores_DC), arrows_D2C.shape[2]
    block = triton.next_power_of_2(places)
    warps = min(8, max(1, block // 32))
    sizes = {"BLOCK": block, "num_warps": warps}
    with torch.cuda.device_of(scores_DC):
        _descend[(width // places,)](scores_DC, arrows_D2C, rows, width, places, **sizes)
