"""What every opt must show, on a small MiniGo."""

import pytest

from core.testing.suites import OptSuite


class TestAsyncSelfplay(OptSuite):
    name = "async_selfplay"
    # Three generations within `steps`. The target is one that even a poor network reaches with search, against the
    # weakest bot, after those steps.
    workload = (
        "workload=minigo", "workload.width=8", "workload.blocks=1", "workload.games=8", "workload.parallel_games=8",
        "workload.simulations=8", "workload.epoch_examples=128", "workload.global_batch_size=32",
        "workload.eval.first=4", "workload.eval.every=1", "workload.eval_games=8", "workload.eval_simulations=16",
        "workload.opponent_simulations=2", "workload.targets.win_rate=0.1",
    )  # fmt: skip
    float64 = True  # the last bit of a float32 can choose another move, and so another game
    changes_by = 0.5
    """Other games give other examples from the second generation on; the loss stays near a new network's."""

    @pytest.mark.convergence
    def test_it_reaches_the_target_with_evidence(self) -> None:
        super().test_it_reaches_the_target_with_evidence()
