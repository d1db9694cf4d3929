"""What the network sees of a position, and the eight symmetries of the board.

Letters: N positions, H positions of history, S board size, P = S * S points, A = P + 1 moves (the last is the pass).
"""

from __future__ import annotations

import torch
from torch import Tensor

from timetrial_minigo.go import BLACK


def planes(stones_NHP: Tensor, to_play_N: Tensor, size: int) -> Tensor:
    """float32 [N, 2H + 1, S, S]: what the network sees.

    `stones_NHP` (int8) is the present position and the H - 1 before it, most recent first, zeros before the game began;
    `to_play_N` (int8) says whose move it is. Planes 2h and 2h + 1 are the stones of the player to move and of the
    opponent h moves ago; the last plane is 1 where black is to play (AlphaGo Zero, Silver et al. 2017, Methods).
    """
    count, history, points = stones_NHP.shape
    out = torch.empty(count, 2 * history + 1, points, device=stones_NHP.device)
    ours = (stones_NHP * to_play_N[:, None, None]).float()
    torch.clamp(ours, min=0, out=out[:, 0:-1:2])
    torch.clamp(ours.neg_(), min=0, out=out[:, 1::2])
    out[:, -1] = (to_play_N == BLACK)[:, None]
    return out.view(count, -1, size, size)


def symmetries(size: int) -> Tensor:
    """int64 [8, P]: `x[..., symmetries(size)[k]]` is the k-th image of `x` [..., P] under the rotations and reflections
    of the square; the first is `x` itself."""
    board = torch.arange(size * size).view(size, size)
    turned = [torch.rot90(board, turns) for turns in range(4)]
    return torch.stack([image.flatten() for board in turned for image in (board, board.T)])


def inverse_symmetries(size: int) -> Tensor:
    """int64 [8, A]: takes logits over the moves of the k-th image back to the moves of the position itself."""
    inverse = symmetries(size).argsort(1)
    return torch.cat([inverse, torch.full((8, 1), size * size)], 1)
