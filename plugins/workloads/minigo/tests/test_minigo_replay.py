"""The window of recent generations: what it keeps, and the examples it gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from timetrial_minigo.features import symmetries
from timetrial_minigo.go import BLACK, WHITE
from timetrial_minigo.replay import Window, exchange, join, nothing
from timetrial_minigo.seams import Examples

SIZE, HISTORY = 3, 3
POINTS = SIZE * SIZE
CPU = torch.device("cpu")


def generation(number: int, lengths: tuple[int, ...] = (4, 2, 5)) -> Examples:
    """Games with the given numbers of positions. Each position's stones are random but for the first two points, which
    tell the generation and the game; all but the first position of a game are trained on."""
    draw = torch.Generator().manual_seed(number)
    ply = torch.cat([torch.arange(length) for length in lengths])
    game = torch.cat([torch.full((length,), k) for k, length in enumerate(lengths)])
    stones = torch.randint(-1, 2, (len(ply), POINTS), generator=draw, dtype=torch.int8)
    stones[:, 0], stones[:, 1] = number, game.to(torch.int8)
    learn = ply > 0
    policy = torch.rand(int(learn.sum()), POINTS + 1, generator=draw).half()
    outcome = (game % 3 - 1).to(torch.int8)
    return Examples(stones, ply.to(torch.int16), outcome, learn, policy)


def window(*generations: int, room: int = 2) -> Window:
    made = Window(room, SIZE, HISTORY, CPU)
    for number in generations:
        made.add(number, generation(number))
    return made


def everything(of: Window, symmetry: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return of.take(torch.arange(len(of)), torch.full((len(of),), symmetry))


def test_it_keeps_the_last_generations() -> None:
    assert Window(2, SIZE, HISTORY, CPU).newest == 0
    held = window(1, 2, 3)
    assert held.newest == 3
    assert set(everything(held)[0][:, 0, 0].tolist()) == {2, 3}
    assert len(held) == 2 * len(generation(1).policy)


def test_an_example_is_a_position_with_those_before_it_in_its_game() -> None:
    stones, to_play, policy, value = everything(window(5, room=1))
    source = generation(5)
    rows = source.learn.nonzero().squeeze(1).tolist()
    for k, row in enumerate(rows):
        ply = int(source.ply[row])
        for back in range(HISTORY):
            expected = source.stones[row - back] if back <= ply else torch.zeros(POINTS, dtype=torch.int8)
            assert torch.equal(stones[k, back], expected)
        assert to_play[k] == (BLACK if ply % 2 == 0 else WHITE)
        assert value[k] == source.outcome[row] * to_play[k]
        assert torch.equal(policy[k], source.policy[k].float())


@pytest.mark.parametrize("k", range(8))
def test_a_symmetry_moves_stones_and_policy_alike_and_leaves_the_pass(k: int) -> None:
    plain, turned, image = everything(window(1)), everything(window(1), k), symmetries(SIZE)[k]
    assert torch.equal(turned[0], plain[0][:, :, image])
    assert torch.equal(turned[2][:, :POINTS], plain[2][:, image])
    assert torch.equal(turned[2][:, POINTS], plain[2][:, POINTS])
    assert torch.equal(turned[1], plain[1]) and torch.equal(turned[3], plain[3])


def test_an_epoch_draws_each_position_as_often_as_any_other_and_all_symmetries() -> None:
    held = window(1, 2)
    order, symmetry = held.draw(1000, seed=7)
    counts = order.bincount(minlength=len(held))
    assert counts.max() - counts.min() <= 1
    assert (symmetry.bincount(minlength=8) > 80).all()
    assert torch.equal(order, held.draw(1000, seed=7)[0])
    assert not torch.equal(order, held.draw(1000, seed=8)[0])


def test_a_window_that_is_saved_and_loaded_goes_on_as_before() -> None:
    held, restored = window(1, 2), Window(2, SIZE, HISTORY, CPU)
    restored.load_state_dict(held.state_dict(hold=True))
    for later in (None, 3):
        if later:
            held.add(later, generation(later))
            restored.add(later, generation(later))
        assert restored.newest == held.newest
        assert all(torch.equal(a, b) for a, b in zip(everything(held), everything(restored), strict=True))


def test_a_rank_that_holds_nothing_in_its_checkpoint_still_says_what_the_window_is() -> None:
    state = window(1, 2).state_dict(hold=False)
    assert state["held"] == window(1, 2).state_dict(hold=True)["held"]
    assert all(len(tensor) == 0 for tensor in state["examples"].values())


def test_one_rank_alone_has_nothing_to_exchange() -> None:
    mine = generation(1)
    assert exchange(mine) is mine
    joined = join([nothing(POINTS), mine])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(joined, mine, strict=True))
