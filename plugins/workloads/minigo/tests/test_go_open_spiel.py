"""The rules, against open_spiel's Go: random games, every position of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pyspiel
import pytest
import torch
from torch import Tensor

from timetrial_minigo.go import Boards, Go, Rules

COLOUR = np.zeros(256, np.int8)
COLOUR[ord("X")], COLOUR[ord("O")] = 1, -1


def stones_of(states: list[pyspiel.State], size: int) -> Tensor:
    """int8 [N, P], from the drawings: two lines, then the rows, the last row first, each after a number."""
    rows = "".join(line[3:] for state in states for line in reversed(str(state).splitlines()[2 : 2 + size]))
    return torch.from_numpy(COLOUR[np.frombuffer(rows.encode(), np.uint8)]).view(len(states), size**2)


def play_together(size: int, games: int, seed: int) -> Counter[str]:
    """Plays random games in both and compares every position; counts what was compared."""
    go, rules = Go(Rules(size, komi=0.5)), f"go(board_size={size},komi={{}})"
    theirs = pyspiel.load_game(rules.format(0.5))
    states, boards = [theirs.new_initial_state() for _ in range(games)], go.start(games)
    seen = torch.full((games, theirs.max_game_length() + 1), go.NO_POSITION)
    draw, count = torch.Generator().manual_seed(seed), Counter(games=games)
    for number in range(theirs.max_game_length()):
        seen[:, number] = boards.hash
        # The position before the last move: what their ko rule keeps from coming back.
        before = seen[:, max(number - 1, 0), None]
        legal = go.legal(boards, before)
        assert torch.equal(boards.stones, stones_of(states, size))
        assert torch.equal(legal, torch.from_numpy(np.array([s.legal_actions_mask() for s in states], bool)))
        count.update(positions=len(states), kos=int((go.legal(boards) ^ legal).sum()))

        superko = legal & ~go.legal(boards, seen)
        move = torch.multinomial(legal.float(), 1, generator=draw)[:, 0]
        repeats = superko.gather(1, move[:, None])[:, 0]
        after = go.play(boards, move)
        for state, action in zip(states, move.tolist(), strict=True):
            state.apply_action(action)
        captured = ((boards.stones != 0) & (after.stones == 0)).sum(1)
        count.update(captures=int((captured > 0).sum()), large=int((captured > 9).sum()))
        over = torch.tensor([state.is_terminal() for state in states])
        last = number + 1 == theirs.max_game_length()
        assert torch.equal(over, go.ended(after) | repeats | last)
        for i in over.nonzero()[:, 0].tolist():
            count.update(scores=int(not repeats[i]), superkos=int(repeats[i]))
            if repeats[i]:
                assert states[i].returns() == [0, 0]
                continue
            area = float(go.score(Boards(*(field[i : i + 1] for field in after)))) + go.rules.komi
            sign = 1 if area > go.rules.komi else -1
            assert states[i].returns() == [sign, -sign]
            again = pyspiel.load_game(rules.format(area)).new_initial_state()  # a draw if it is their area, too
            for action in states[i].history():
                again.apply_action(action)
            assert again.is_terminal() and again.returns() == [0, 0]
        keep = (~over).nonzero()[:, 0]
        states, seen = [states[i] for i in keep], seen[keep]
        boards = Boards(*(field[keep] for field in after))
        if not states:
            break
    return count


def check(record_property: Callable[[str, object], None], counts: list[Counter[str]]) -> Counter[str]:
    total = Counter[str]()
    for count in counts:
        total.update(count)
    for name, number in total.items():
        record_property(name, number)
    print(dict(total))
    assert total["scores"] + total["superkos"] == total["games"]
    assert all(total[name] > 50 for name in ("positions", "kos", "captures", "large", "scores"))
    return total


def test_random_games_go_as_in_open_spiel(record_property: Callable[[str, object], None]) -> None:
    games = {5: 160, 7: 60, 9: 40, 13: 12, 19: 4}
    check(record_property, [play_together(size, n, seed=size) for size, n in games.items()])


@pytest.mark.convergence
@pytest.mark.timeout(3600)
def test_ten_thousand_random_games_go_as_in_open_spiel(record_property: Callable[[str, object], None]) -> None:
    counts = [play_together(size, 500, seed) for size in (5, 7, 9, 13, 19) for seed in range(4)]
    total = check(record_property, counts)
    assert total["games"] == 10_000 and total["superkos"] > 0


# -------------------------------------------------------------------------------- where the rules are not the same


def opened(moves: str, **more: bool) -> tuple[Go, Boards, Tensor, pyspiel.State]:
    """A 5x5 board of ours and theirs after these moves, as in "0,1 0,3", and our earlier positions."""
    go, state = Go(Rules(5, 0.5, **more)), pyspiel.load_game("go(board_size=5,komi=0.5)").new_initial_state()
    boards, seen = go.start(1), []
    for move in moves.split():
        point = int(move[0]) * 5 + int(move[2])
        seen.append(boards.hash)
        boards = go.play(boards, torch.tensor([point]))
        state.apply_action(point)
    return go, boards, torch.stack(seen, 1), state


def test_a_repetition_that_is_no_ko_is_illegal_here_and_a_draw_there() -> None:
    """Black sent two stones, white took them, and black takes the one back: the position has been there before."""
    go, boards, seen, state = opened("0,1 0,3 1,0 1,1 4,4 1,2 0,2 0,0")
    again = 1
    assert go.legal(boards, seen[:, -1:])[0, again] and not go.legal(boards, seen)[0, again]
    assert again in state.legal_actions()
    state.apply_action(again)
    assert state.is_terminal() and state.returns() == [0, 0]


@pytest.mark.parametrize("suicide", [False, True])
def test_suicide_of_two_stones_is_legal_here_if_the_rules_say_so_and_never_there(suicide: bool) -> None:
    go, boards, seen, state = opened("0,0 1,0 4,4 1,1 4,3 0,2", suicide=suicide)
    assert go.legal(boards, seen)[0, 1] == suicide
    assert 1 not in state.legal_actions()


def test_a_game_has_no_last_move_here_and_two_for_each_point_there() -> None:
    go, boards, seen, state = opened("2,2 1,1")
    draw = torch.Generator().manual_seed(0)
    for _ in range(2 * go.points - 2):
        assert not state.is_terminal()
        seen = torch.cat([seen, boards.hash[:, None]], 1)
        weight = go.legal(boards, seen).float()
        weight[:, -1] = 1e-6  # passes if it must
        move = torch.multinomial(weight, 1, generator=draw)[:, 0]
        boards = go.play(boards, move)
        state.apply_action(int(move))
    assert state.is_terminal() and not go.ended(boards)
