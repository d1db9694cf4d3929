"""The workload's settings, its batches, its evaluation, the closed log, and the target."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlperf_logging
import pytest
import torch
import yaml
from torch import Tensor

from core.testing.cli import Outcome, run_cli
from core.testing.fixtures import FakePlugin
from timetrial_minigo import network
from timetrial_minigo.workload import METRIC, MiniGoWorkload

MakeWorkload = Callable[..., MiniGoWorkload]

RULES = Path(mlperf_logging.__file__).parent / "compliance_checker" / "training_1.1.0"
TINY = (
    "games=8", "parallel_games=8", "simulations=4", "move_limit=12", "width=4", "value_hidden=8", "epoch_examples=32",
    "global_batch_size=16", "eval_games=8",
)  # fmt: skip


def checker(log: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "1.1.0"]
    return subprocess.run([*command, "--werror", str(log)], capture_output=True, text=True, cwd=log.parent, check=False)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("epoch_examples=100",), "epoch_examples=100 is not a multiple of workload.global_batch_size: try 128"),
        (("learning_rates=[0.1,0.01]",), "one positive rate more than there are steps"),
        (("learning_rates=[0.1,0.01,0.001]", "learning_rate_steps=[20,10]"), "the steps in order"),
        (("size=2", "selfplay_opening=3"), "more than 2 random stones do not fit on 2x2"),
        (("suicide=true",), "open_spiel forbids suicide"),
        (("method=gumbel", "soft_moves=4"), "method=gumbel draws its moves itself"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    overrides: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    settings = (f"workload.{override}" for override in overrides)
    refused = run_cli("workload=minigo", *settings, run_dir=tmp_path / "run").expect(2)
    assert refused.failure == "usage" and words in refused.stderr


def test_the_learning_rate_changes_after_its_boundaries(make: MakeWorkload) -> None:
    workload = make("minigo", "learning_rates=[0.3,0.2,0.1]", "learning_rate_steps=[10,20]")
    assert [workload.learning_rate(step) for step in (0, 10, 11, 20, 21, 99)] == [0.3, 0.3, 0.2, 0.2, 0.1, 0.1]


# -------------------------------------------------------------------------------------------------------------- batches


def test_batches_can_be_taken_up_in_the_middle_of_an_epoch_without_playing_again(make: MakeWorkload) -> None:
    workload = make("minigo", *TINY)
    whole = list(workload.batches(1, 0))
    assert [batch.samples for batch in whole] == [16, 16]
    workload.generation = lambda generation: pytest.fail("the window holds this generation")
    (rest,) = workload.batches(1, 1)
    assert all(torch.equal(rest.data[name], whole[1].data[name]) for name in rest.data)


def test_two_ranks_share_a_batch(make: MakeWorkload) -> None:
    one = make("minigo", *TINY)
    examples = one.play_share(1)
    one.window.add(1, examples)
    batches = list(one.batches(1, 0))
    halves: list[list[Tensor]] = []
    for rank in range(2):
        mine = make("minigo", *TINY, rank=rank, world=2)
        mine.window.add(1, examples)
        halves.append([batch.data["planes"] for batch in mine.batches(1, 0)])
    for batch, first, second in zip(batches, *halves, strict=True):
        assert torch.equal(torch.cat([first, second]), batch.data["planes"])


@pytest.mark.parametrize("splits_data", [True, False])
def test_ranks_that_share_a_model_are_refused_before_anything_starts(
    fake_plugin: FakePlugin, tmp_path: Path, splits_data: bool
) -> None:
    source = f"""
    class P(Plugin):
        spec = OptSpec(interface=2, summary="shares a model", numerics="tolerance")
        Config = Config

        @hookimpl
        def dimensions(self):
            return [Dimension(name="shard", size=2, splits_data={splits_data}, nearness=20)]
    """
    site = fake_plugin("opt", "sharer", source)
    refused = run_cli(
        "workload=minigo", "+opt=sharer", "launch.nproc=2", run_dir=tmp_path / "run", PYTHONPATH=str(site)
    ).expect(2)  # fmt: skip
    assert refused.failure == "not_offered" and "mesh dimension shard" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_every_batch_has_the_shapes_of_the_only_example(make: MakeWorkload) -> None:
    workload = make("minigo", *TINY)
    shapes = [
        {name: (tuple(t.shape), t.dtype) for name, t in batch.data.items()}
        for batch in [*workload.example_batches(), *workload.batches(1, 0)]
    ]
    assert shapes == [shapes[0]] * 3


@pytest.mark.numbers
def test_the_loss_is_what_the_reference_adds_up(make: MakeWorkload) -> None:
    workload = make("minigo", *TINY, "value_weight=0.5")
    (batch, _) = workload.batches(1, 0)
    found = workload.loss(workload.ctx.model, batch.data)
    logits, value = workload.ctx.model(batch.data["planes"])
    policy = -(batch.data["policy"] * logits.log_softmax(1)).sum(1).mean()
    error = (value - batch.data["value"]).square().mean()
    torch.testing.assert_close(found["loss"], policy + 0.5 * error, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.numbers
def test_two_ranks_find_the_games_that_one_finds(make: MakeWorkload) -> None:
    def played(games: range, **where: int) -> list[tuple[int, tuple[int, ...]]]:
        workload = make("minigo", *TINY, "opponent_simulations=4", **where)
        model = workload.ctx.model.double().eval()  # the last bit of a float32 could choose another move
        with torch.no_grad():
            found = workload._play_evaluation(lambda planes: model(planes.double()), games)
        return [(game.number, game.moves) for game in found]

    alone = played(range(8))
    assert alone == [*played(range(4), rank=0, world=2), *played(range(4, 8), rank=1, world=2)]
    assert len({moves for _, moves in alone}) > 4


def test_the_win_rate_counts_our_wins_and_the_games_are_kept(make: MakeWorkload, tmp_path: Path) -> None:
    workload = make("minigo", *TINY, "opponent_simulations=2", "save_games=3")
    workload.ctx.model.eval()
    with torch.no_grad():
        quality = workload.evaluate(workload.ctx.infer)
        games = workload._play_evaluation(workload._evaluator(workload.ctx.infer), range(8))
    assert quality == {METRIC: sum(game.won for game in games) / 8}
    assert len(list(tmp_path.rglob("*.sgf"))) == 3
    assert len(workload.ctx.figures["last_evaluation_game"]) > 5


def test_a_checkpoint_to_play_against_is_asked_for_in_one_line(tmp_path: Path) -> None:
    refused = run_cli("workload=minigo_mlperf", run_dir=tmp_path / "run")
    assert refused.failure == "usage" and "target_checkpoint is not set" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    other = run_cli("workload=minigo_mlperf", f"workload.target_checkpoint={tmp_path}", run_dir=tmp_path / "other")
    assert other.failure == "usage" and "no trained network at" in other.stderr


# ------------------------------------------------------------------------------------------------------- the closed run

CLOSED = (
    *TINY, "size=5", "komi=0.5", "soft_moves=4", "virtual_losses=2", "eval_simulations=4", "max_epochs=2",
    "noise_alpha=0.75", "targets.win_rate=0.95",
)  # fmt: skip


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """A tiny run of the closed configuration to its end, against the network that another one has ended with."""
    folder = tmp_path_factory.mktemp("closed")
    sizes = network.Sizes(
        board=5, history=1, width=6, blocks=1, policy_channels=2, value_channels=1, value_hidden=4
    )  # fmt: skip
    target = network.PolicyValueNet(sizes, network.batch_norm(False, torch.device("cpu")))
    network.initialise(target, torch.Generator().manual_seed(3))
    network.safetensors.torch.save_file(target.state_dict(), folder / "target.safetensors")
    settings = (f"workload.{setting}" for setting in CLOSED)
    done = run_cli(
        "workload=minigo_mlperf", f"workload.target_checkpoint={folder / 'target.safetensors'}", *settings,
        run_dir=folder / "run",
    )  # fmt: skip
    return done.expect(4), done.run_dir


def test_a_run_trains_and_plays_against_a_target_and_its_log_passes_the_official_checker(
    closed: tuple[Outcome, Path],
) -> None:
    done, run_dir = closed
    assert done.result["steps"] == 4 and 0 <= done.result["quality"][METRIC] < 0.95
    assert len(set(done.losses)) == 4
    checked = checker(run_dir / "result_0.txt")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_its_log_carries_every_key_and_tensor_of_the_closed_rules(closed: tuple[Outcome, Path]) -> None:
    lines = (closed[1] / "result_0.txt").read_text().splitlines()
    entries: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        entry = json.loads(line.partition(":::MLLOG ")[2])
        entries.setdefault(entry["key"], []).append(entry)
    needed: set[str] = set()
    broken: set[str] = set()
    for rules in ("common", "closed_common", "closed_minigo"):
        for record in yaml.safe_load((RULES / f"{rules}.yaml").read_text()):
            key = record.get("KEY", {})
            if key.get("REQ") in ("EXACTLY_ONE", "AT_LEAST_ONE"):
                needed.add(key["NAME"])
            if rules == "closed_minigo" and key.get("NAME") in entries:
                checks = key.get("CHECK", [])
                found = entries[key["NAME"]]
                broken |= {key["NAME"] for check in checks for v in found if not eval(check, {"v": v})}
    assert len(needed) == 20 and needed <= entries.keys()
    assert broken == {f"{which}_selfplay_games_per_generation" for which in ("actual", "min")}  # 8 games are too few
    (rule,) = (r["END"]["CHECK"] for r in yaml.safe_load((RULES / "closed_minigo.yaml").read_text()) if "END" in r)
    tensors = [entry["metadata"]["tensor"] for entry in entries["weights_initialization"]]
    assert len(tensors) == 48 and eval(rule, {"s": {"initialized_tensors": tensors}, "sorted": sorted})


def test_the_closed_option_has_the_values_of_the_rules(make: MakeWorkload) -> None:
    workload = make("minigo_mlperf")
    logged = workload.log_values()
    assert logged["actual_selfplay_games_per_generation"] == logged["min_selfplay_games_per_generation"] == 8192
    assert (workload.targets[0].value, workload.eval_cadence.every, workload.eval_cadence.first) == (0.5, 1, 1)
    assert workload.search.leaves == logged["virtual_losses"] == 8
    assert workload.go.rules.size == 19 and workload.config.history == 8
    assert len(workload.weight_names(workload.ctx.model)) == 48


# ----------------------------------------------------------------------------------------------------------- the target


@pytest.mark.convergence
@pytest.mark.timeout(800)
def test_the_target_is_reached_and_the_log_passes_the_official_checker(tmp_path: Path) -> None:
    done = run_cli("workload=minigo", run_dir=tmp_path / "run").expect(0)
    assert done.result["quality"][METRIC] >= done.result["targets"][METRIC]["value"]
    checked = checker(done.run_dir / "result_0.txt")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.numbers
def test_an_untrained_network_is_far_from_the_target(make: MakeWorkload) -> None:
    """On a part of the evaluation's games; the card has the figures over all of them."""
    rates: list[float] = []
    for seed in range(1, 4):
        workload = make("minigo", seed=seed)
        workload.ctx.model.eval()
        with torch.no_grad():
            games = workload._play_evaluation(workload._evaluator(workload.ctx.infer), range(20))
        rates.append(sum(game.won for game in games) / len(games))
    assert max(rates) <= 0.2 < workload.targets[0].value / 2
