"""Games of self-play, by evaluators that answer for each position alone, whatever it is evaluated beside."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.api.types import RunContext
from timetrial_minigo.go import BLACK, WHITE, Go, Rules
from timetrial_minigo.replay import join
from timetrial_minigo.seams import Examples
from timetrial_minigo.search import Evaluate, SearchSettings
from timetrial_minigo.selfplay import SelfPlay, SelfPlaySettings

SIZE, GAMES = 4, 90  # more games than are drawn for together
PLAIN = SelfPlaySettings(
    parallel_games=GAMES, opening=0, move_limit=30, soft_moves=6, soft_exponent=1.0, resign_threshold=-1.0,
    disable_resign_share=0.0, holdout_share=0.0, train_filter=1.0, random_symmetry=False,
)  # fmt: skip

FIVE = SearchSettings(simulations=5)


def by_stones(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Likes the points of the upper left, and to have more stones than the other; exact, in integers."""
    count, points = len(planes), planes[0, 0].numel()
    logits = torch.linspace(1, 0, points + 1).expand(count, -1)
    return logits, (planes[:, 0] - planes[:, 1]).sum((1, 2)) / 64


def play(
    settings: SelfPlaySettings = PLAIN, mine: range = range(GAMES), evaluate: Evaluate = by_stones, seed: int = 1,
    search: SearchSettings = FIVE, simulations: int = 5,
    playouts: Callable[[int, int, int], tuple[Tensor, Tensor]] | None = None, generation: int = 1,
) -> Examples:  # fmt: skip
    ctx = RunContext(config=None, run_dir=None, seed=seed)  # pyright: ignore[reportArgumentType]
    go = Go(Rules(SIZE, 0.5))
    alike = lambda *_: (torch.full((GAMES,), simulations), torch.ones(GAMES, dtype=torch.bool))  # noqa: E731
    player = SelfPlay(go, settings, search, evaluate, 2, ctx.seed_for, lambda *_: None)
    return player.play(generation, GAMES, mine, playouts or alike)


def games(examples: Examples) -> Iterator[tuple[slice, Tensor]]:
    starts = [*(examples.ply == 0).nonzero().squeeze(1).tolist(), len(examples.ply)]
    for start, end in itertools.pairwise(starts):
        yield slice(start, end), examples.stones[start:end]


def assert_equal(first: Examples, second: Examples) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_position_follows_from_the_one_before_by_a_legal_move_and_policies_are_of_legal_moves() -> None:
    examples, go = play(replace(PLAIN, opening=3)), Go(Rules(SIZE, 0.5))
    policies = dict(zip(examples.learn.nonzero().squeeze(1).tolist(), examples.policy, strict=True))
    assert len(list(games(examples))) == GAMES
    for place, stones in games(examples):
        boards = go.start(1)
        seen = boards.hash[:, None]
        assert examples.ply[place].tolist() == list(range(len(stones)))
        assert len(examples.outcome[place].unique()) == 1
        for row, now in enumerate(stones):
            assert torch.equal(boards.stones[0], now)
            legal = go.legal(boards, seen)[0]
            policy = policies.get(place.start + row)
            assert policy is None or (policy.sum() == pytest.approx(1, abs=1e-2) and not policy[~legal].any())
            if row + 1 < len(stones):
                tried = go.play(
                    type(boards)(*(f.expand(go.moves, *f.shape[1:]) for f in boards)), torch.arange(go.moves)
                )
                fits = (tried.stones == stones[row + 1]).all(1) & legal
                assert fits.any()
                boards = go.play(boards, fits.nonzero()[:1, 0])
                seen = torch.cat([seen, boards.hash[:, None]], 1)


def test_a_game_is_the_same_whichever_rank_plays_it_and_however_many_are_played_beside_it() -> None:
    whole = play(replace(PLAIN, opening=2, train_filter=0.5))
    parts = [
        play(replace(PLAIN, opening=2, train_filter=0.5), range(a, b)) for a, b in ((0, 20), (20, 71), (71, GAMES))
    ]
    assert_equal(whole, join(parts))
    assert_equal(whole, play(replace(PLAIN, opening=2, train_filter=0.5, parallel_games=13)))


def test_generations_and_seeds_give_other_games() -> None:
    first = play()
    assert_equal(first, play())
    for other in (play(seed=2), play(generation=2)):
        assert first.stones.shape != other.stones.shape or not torch.equal(first.stones, other.stones)


def test_a_game_begins_with_as_many_random_stones_as_it_draws_which_are_not_trained_on() -> None:
    examples = play(replace(PLAIN, opening=3))
    begun = [int(examples.learn[place].int().argmax()) for place, _ in games(examples)]
    assert set(begun) == {1, 2, 3}
    assert len({tuple(stones[1].tolist()) for _, stones in games(examples)}) > 10  # first stones all over the board
    for place, _ in games(examples):
        learnt = examples.learn[place]
        assert learnt[int(learnt.int().argmax()) :].all()


def test_the_outcome_is_the_score_at_the_end() -> None:
    def passes(planes: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.full((len(planes), SIZE**2 + 1), -20.0)
        logits[:, -1] = 20
        return logits, torch.zeros(len(planes))

    search = SearchSettings(simulations=1)
    examples = play(replace(PLAIN, soft_moves=0, opening=1), evaluate=passes, search=search, simulations=1)
    for place, stones in games(examples):
        assert len(stones) == 3  # a black stone and two passes: it owns the board
        assert set(examples.outcome[place].tolist()) == {BLACK}


def test_whoever_values_the_position_below_the_threshold_resigns_unless_resignation_is_disabled() -> None:
    def white_despairs(planes: Tensor) -> tuple[Tensor, Tensor]:
        logits, _ = by_stones(planes)
        return logits, torch.where(planes[:, -1, 0, 0] == 0, -0.99, 0.99)

    resigning = replace(PLAIN, resign_threshold=-0.5)
    examples = play(resigning, evaluate=white_despairs)
    for place, stones in games(examples):
        assert len(stones) == 2 and set(examples.outcome[place].tolist()) == {BLACK}
        assert examples.learn[place].tolist() == [True, False]
    lengths = [
        len(stones) for _, stones in games(play(replace(resigning, disable_resign_share=0.3), evaluate=white_despairs))
    ]
    assert 0.15 < sum(length > 2 for length in lengths) / GAMES < 0.45
    never = play(replace(resigning, disable_resign_share=1.0), evaluate=white_despairs)
    assert all(len(stones) > 2 for _, stones in games(never))


def test_only_so_many_positions_are_kept_and_none_of_games_held_out() -> None:
    whole = play()
    kept = play(replace(PLAIN, train_filter=0.3))
    assert torch.equal(whole.stones, kept.stones)
    assert 0.25 < len(kept.policy) / len(whole.policy) < 0.35
    held_out = play(replace(PLAIN, holdout_share=0.4))
    assert torch.equal(whole.stones, held_out.stones)
    trained = [bool(held_out.learn[place].any()) for place, _ in games(held_out)]
    assert 0.45 < sum(trained) / GAMES < 0.75
    assert all(held_out.learn[place].all() for (place, _), on in zip(games(held_out), trained, strict=True) if on)


def test_each_move_gets_the_simulations_it_is_given_and_is_recorded_as_told() -> None:
    evaluated = 0

    def counting(planes: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal evaluated
        evaluated += len(planes)
        return by_stones(planes)

    def every_second(generation: int, ply: int, count: int) -> tuple[Tensor, Tensor]:
        full = (torch.arange(count) + ply) % 2 == 0
        return torch.where(full, 5, 2), full

    examples = play(replace(PLAIN, move_limit=4), evaluate=counting, playouts=every_second)
    for game, (place, _) in enumerate(games(examples)):
        assert [bool(on) for on in examples.learn[place]] == [(game + ply) % 2 == 0 for ply in range(4)]
    assert evaluated == GAMES * 4 * (5 + 2) // 2


def test_soft_moves_are_drawn_by_their_visits_and_later_ones_are_the_best() -> None:
    def flat(planes: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(planes), SIZE**2 + 1), torch.zeros(len(planes))

    quiet = SearchSettings(simulations=40, noise_fraction=0.0, value_init_penalty=0.0)
    examples = play(replace(PLAIN, soft_moves=1, move_limit=3), evaluate=flat, search=quiet, simulations=40)
    second = torch.stack([stones[1] for _, stones in games(examples)])
    share = second.abs().sum(0) / GAMES
    expected = examples.policy[0, : SIZE**2].float()
    assert expected.max() < 0.2 and ((share - expected).abs() < 4 * (0.2 * 0.8 / GAMES) ** 0.5).all()  # standard errors
    assert (share > 0).sum() > SIZE**2 / 2
    hard = play(replace(PLAIN, soft_moves=0, move_limit=3), evaluate=flat, search=quiet, simulations=40)
    assert len({tuple(stones[-1].tolist()) for _, stones in games(hard)}) == 1
    unsearched = play(replace(PLAIN, soft_moves=3, move_limit=3), search=quiet, simulations=1)
    assert {tuple(stones[1].tolist()) for _, stones in games(unsearched)} == {(BLACK, *[0] * (SIZE**2 - 1))}


def test_symmetries_drawn_at_random_change_nothing_for_an_evaluator_that_knows_none_but_all_for_one_that_does() -> None:
    def alike(planes: Tensor) -> tuple[Tensor, Tensor]:
        logits, value = by_stones(planes)
        return torch.zeros_like(logits), value

    turned = replace(PLAIN, random_symmetry=True)
    assert_equal(play(evaluate=alike), play(turned, evaluate=alike))
    assert not torch.equal(play().policy[:GAMES], play(turned).policy[:GAMES])


def test_gumbel_search_plays_games_too() -> None:
    settings = SearchSettings(simulations=8, method="gumbel")
    examples = play(replace(PLAIN, soft_moves=0), search=settings, simulations=8)
    assert len({tuple(stones[1].tolist()) for _, stones in games(examples)}) > 3
    assert (examples.policy.float().sum(1) - 1).abs().max() < 1e-2
    assert {BLACK, WHITE} >= set(examples.outcome.tolist())
