"""The network's planes and the symmetries of the board."""

import torch

from timetrial_minigo.features import inverse_symmetries, planes, symmetries
from timetrial_minigo.go import BLACK, WHITE


def test_planes_are_those_of_the_player_to_move_and_of_the_opponent_back_in_time():
    now, before = [1, 0, -1, 0, 0, 1, 0, 0, 0], [1, 0, -1, 0, 0, 0, 0, 0, 0]
    stones = torch.tensor([[now, before]] * 2, dtype=torch.int8)
    seen = planes(stones, torch.tensor([WHITE, BLACK], dtype=torch.int8), 3)
    black = [[1.0 * (s == 1) for s in line] for line in (now, before)]
    white = [[1.0 * (s == -1) for s in line] for line in (now, before)]
    assert seen.shape == (2, 5, 3, 3) and seen.dtype == torch.float32
    assert seen[0].flatten(1).tolist() == [white[0], black[0], white[1], black[1], [0.0] * 9]
    assert seen[1].flatten(1).tolist() == [black[0], white[0], black[1], white[1], [1.0] * 9]


def test_symmetries_are_the_eight_of_the_square_and_their_inverses_undo_them():
    corner = torch.arange(9).view(3, 3)
    images = [corner.flatten()[turn].view(3, 3) for turn in symmetries(3)]
    assert torch.equal(images[0], corner)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 8
    for image in images:  # neighbours stay neighbours
        assert {abs(int(a) - int(b)) for a, b in zip(image[0], image[0][1:], strict=False)} <= {1, 3}
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0))
    for turn, back in zip(symmetries(3), inverse_symmetries(3), strict=True):
        turned = torch.cat([logits[:9][turn], logits[9:]])
        assert torch.equal(turned[back], logits)
