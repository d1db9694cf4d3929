"""The workload as core's loop sees it: an epoch is a generation of self-play and the training on its games."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mlperf_logging.mllog import constants
from torch import Tensor, nn
from torch.nn import functional as F

from core.api import faults
from core.api.data import EpochSampler, eval_cadence, eval_share
from core.api.errors import UsageError
from core.api.types import Batch, Capture, Forward, Outputs, RunContext, Target, WorkloadSpec
from timetrial_minigo import features, gating, network, sgf
from timetrial_minigo.go import Go, Rules
from timetrial_minigo.opponent import Choose, Game, OpenSpiel, play_match
from timetrial_minigo.replay import Window, exchange
from timetrial_minigo.seams import FIGURE, GENERATION, PLAYOUTS, Examples
from timetrial_minigo.search import Evaluate, SearchSettings
from timetrial_minigo.selfplay import SelfPlay, SelfPlaySettings

if TYPE_CHECKING:
    from timetrial_minigo.config import MiniGoConfig

METRIC = "win_rate"
OURS = "timetrial"
"""The name of our side in records of games."""


class MiniGoWorkload:
    """Go by self-play. `Batch.data` is, for B examples: planes [B, 2H + 1, S, S] float32, policy [B, A] float32 (what
    the search found) and value [B] float32 (the game's end for the player to move); `infer` needs the planes alone."""

    def __init__(self, spec: WorkloadSpec, config: MiniGoConfig, ctx: RunContext) -> None:
        self.spec, self.config, self.ctx = spec, config, ctx
        self.targets = [Target(METRIC, config.targets[METRIC])]
        self.eval_cadence = eval_cadence(config.eval)
        self.capture = Capture(step=True)
        self.max_epochs, self.global_batch_size = config.max_epochs, config.global_batch_size
        self.train_samples, self.eval_samples = config.epoch_examples, config.eval_games
        self.go = Go(Rules(config.size, config.komi, config.suicide), ctx.device)
        self.window = Window(config.window, config.size, config.history, ctx.device)
        self.search = search_settings(config, config.simulations)
        self._selfplay: SelfPlay | None = None
        self._target: network.PolicyValueNet | None = None
        self._sampler = EpochSampler(
            examples=config.epoch_examples,
            global_batch=config.global_batch_size,
            rank=ctx.data_rank,
            world_size=ctx.data_size,
        )

    # ------------------------------------------------------------------------------------------------------- data

    def check_data(self) -> None:
        """There is none but the network to play against, where one is asked for."""
        config = self.config
        if config.opponent != "checkpoint":
            return
        assert config.target_checkpoint  # `check` refuses a run without
        self._target = network.read(Path(config.target_checkpoint).expanduser()).to(self.ctx.device)
        board = self._target.sizes.board
        if board != config.size:
            raise UsageError(f"{config.target_checkpoint} plays on {board}x{board}: set workload.size={board}")

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """Plays the epoch's games, unless the window holds them already, as it does where a run goes on in the middle
        of an epoch; then come the batches drawn from the window."""
        if self.window.newest < epoch:
            self.window.add(epoch, exchange(self.generation(epoch)))
        order, symmetry = self.window.draw(self.train_samples, self.ctx.seed_for("draw", epoch))
        for share in self._sampler.epoch(self.ctx.seed_for("shuffle", epoch), first_batch):
            rows = torch.from_numpy(share.indices)
            stones, to_play, policy, value = self.window.take(order[rows], symmetry[rows])
            data = {"planes": features.planes(stones, to_play, self.config.size), "policy": policy, "value": value}
            yield Batch(data, share.samples, share.weight)

    def example_batches(self) -> Iterator[Batch]:
        """Random stones, policies and outcomes."""
        config, size = self.config, self.global_batch_size // self.ctx.data_size
        generator = torch.Generator().manual_seed(self.ctx.seed_for("synthetic", self.ctx.data_rank))
        shape = (size, config.history, config.size**2)
        stones = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
        black = torch.ones(size, dtype=torch.int8)
        data = {
            "planes": features.planes(stones, black, config.size),
            "policy": torch.randn(size, self.go.moves, generator=generator).softmax(1),
            "value": torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1,
        }
        yield Batch({name: t.to(self.ctx.device) for name, t in data.items()}, self.global_batch_size)

    # -------------------------------------------------------------------------------------------------- self-play

    def play_share(self, generation: int) -> Examples:
        """This rank's share of the games of a generation, by the network as it is now."""
        mine = eval_share(self.config.games, self.ctx.data_rank, self.ctx.data_size)
        if self._selfplay is None:
            self._selfplay = SelfPlay(
                self.go, _selfplay_settings(self.config), self.search, self._evaluator(self.ctx.infer),
                self.config.history, self.ctx.seed_for, self._after_move,
            )  # fmt: skip
        self.ctx.model.eval()
        with torch.no_grad():
            played = self._selfplay.play(generation, self.config.games, mine, self.playouts)
        self.ctx.model.train()
        self.ctx.figures[FIGURE] = self._selfplay.counts.copy()
        return played

    def all_alike(self, generation: int, ply: int, games: int) -> tuple[Tensor, Tensor]:
        """`Playouts`: each move gets as many simulations as any other, and each position is trained on."""
        return torch.full((games,), self.config.simulations), torch.ones(games, dtype=torch.bool)

    def _after_move(self, generation: int, ply: int) -> None:
        faults.strike("selfplay", generation, self.ctx.rank)

    def _evaluator(self, infer: Forward) -> Evaluate:
        return lambda planes: infer({"planes": planes})

    # ------------------------------------------------------------------------------------------ model and optimizer

    def build_model(self) -> nn.Module:
        config = self.config
        self.generation, self.playouts = self.play_share, self.all_alike
        if not self.ctx.synthetic:  # on synthetic data nobody plays
            self.generation = self.ctx.offer(GENERATION, self.play_share)
            self.playouts = self.ctx.offer(PLAYOUTS, self.all_alike)
        sizes = network.Sizes(
            board=config.size,
            history=config.history,
            width=config.width,
            blocks=config.blocks,
            policy_channels=config.policy_channels,
            value_channels=config.value_channels,
            value_hidden=config.value_hidden,
        )
        sync = config.sync_batch_norm and self.ctx.data_size > 1
        model = network.PolicyValueNet(sizes, network.batch_norm(sync, self.ctx.device))
        network.initialise(model, torch.Generator().manual_seed(self.ctx.seed_for("init")))
        return model

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.blocks)

    def build_optimizer(self, model: Any) -> torch.optim.Optimizer:
        config = self.config
        groups = network.parameter_groups(model, config.weight_decay)
        return torch.optim.SGD(groups, lr=config.learning_rates[0], momentum=config.momentum)

    def learning_rate(self, step: int) -> float:
        """Constant between boundaries, which belong to what is before (reference: tf.train.piecewise_constant)."""
        return self.config.learning_rates[bisect.bisect_left(self.config.learning_rate_steps, step)]

    # ------------------------------------------------------------------------------------------ loss and evaluation

    def loss(self, model: nn.Module, data: dict[str, Tensor]) -> Outputs:
        """Cross-entropy of the policy plus the value's squared error, weighted (reference: model_fn)."""
        logits_BA, value_B = model(data["planes"])
        policy = F.cross_entropy(logits_BA, data["policy"])
        value = F.mse_loss(value_B, data["value"])
        return {"loss": policy + self.config.value_weight * value, "policy_loss": policy, "value_loss": value}

    def infer(self, model: nn.Module, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [B, A] and value [B], of positions in training, in self-play and in evaluation alike."""
        return model(data["planes"])

    def evaluate(self, infer: Forward) -> dict[str, float]:
        """Share of games won, each rank playing its own; a draw counts a half."""
        config = self.config
        mine = eval_share(self.eval_samples, self.ctx.data_rank, self.ctx.data_size)
        games = self._play_evaluation(self._evaluator(infer), mine)
        counts = self.ctx.gather([sum(game.won for game in games), float(len(games))])
        if self.ctx.rank == 0 and config.save_games:
            folder = self.ctx.run_dir / "games" / f"generation_{self.window.newest:04d}"
            sgf.save_games(folder, games[: config.save_games], self.go.rules, OURS, self.opponent_name)
            self.ctx.figures["last_evaluation_game"] = sgf.final_board(games[0], self.go.rules)
        return {METRIC: sum(won for won, _ in counts) / sum(played for _, played in counts)}

    def _play_evaluation(self, evaluate: Evaluate, games: range) -> list[Game]:
        """The same openings and the same seeds of the opponent in each evaluation of a run."""
        config, seed = self.config, self.ctx.seed_for("evaluation")
        ours = self._player(evaluate, config.history, len(games), "ours")
        opening, limit = config.eval_opening, config.move_limit
        if self._target is None:
            return play_match(
                self.go, ours, self._open_spiel(), games, seed,
                history=config.history, opening=opening, move_limit=limit,
            )  # fmt: skip
        other = self._target.sizes.history
        theirs = self._player(self._target, other, len(games), "theirs")
        return gating.play_networks(
            self.go, ours, theirs, games, seed,
            history=max(config.history, other), opening=opening, move_limit=limit,
        )  # fmt: skip

    def _player(self, evaluate: Evaluate, history: int, games: int, side: str) -> Choose:
        config = self.config
        if not config.eval_simulations:
            return gating.first_choice(self.go, evaluate, history)
        settings = search_settings(config, config.eval_simulations)
        seed = self.ctx.seed_for("symmetry", side, self.ctx.data_rank) if config.random_symmetry else None
        return gating.searching(self.go, evaluate, history, settings, games, seed)

    def _open_spiel(self) -> OpenSpiel:
        return OpenSpiel(self.config.opponent_simulations, self.config.opponent_rollouts, self.config.uct_c)

    @property
    def opponent_name(self) -> str:
        return self._open_spiel().name if self._target is None else f"network of {self.config.target_checkpoint}"

    # --------------------------------------------------------------------------------------------- log and checkpoint

    def log_values(self) -> Mapping[str, Any]:
        """v1.1 rules, compliance_checker/training_1.1.0/closed_minigo.yaml; and the keys of train_loop.py."""
        config = self.config
        return {
            "train_batch_size": config.global_batch_size,
            "lr_boundaries": list(config.learning_rate_steps),
            "lr_rates": list(config.learning_rates),
            "actual_selfplay_games_per_generation": config.games,
            "min_selfplay_games_per_generation": config.games,
            constants.OPT_WEIGHT_DECAY: config.weight_decay,
            "filter_amount": config.train_filter,
            "window_size": config.window,
            "num_games": config.games,
            "num_readouts": config.simulations,
            "value_init_penalty": config.value_init_penalty,
            "holdout_pct": config.holdout_share,
            "disable_resign_pct": config.disable_resign_share,
            "resign_threshold": config.resign_threshold,
            "parallel_games": config.parallel_games,
            "virtual_losses": config.virtual_losses,
            "gating_win_rate": config.targets[METRIC],
            "eval_games": config.eval_games,
        }

    def weight_names(self, model: nn.Module) -> list[str]:
        return network.closed_names(self.config.blocks)

    def state_dict(self) -> dict[str, Any]:
        return {"window": self.window.state_dict(hold=self.ctx.rank == 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window.load_state_dict(state["window"])


def search_settings(config: MiniGoConfig, simulations: int) -> SearchSettings:
    return SearchSettings(
        simulations=simulations,
        method=config.method,  # pyright: ignore[reportArgumentType]  # one of its choices
        c_puct_base=config.c_puct_base,
        c_puct_init=config.c_puct_init,
        value_init_penalty=config.value_init_penalty,
        noise_alpha=config.noise_alpha,
        noise_fraction=config.noise_fraction,
        leaves=config.virtual_losses,
        reuse=config.reuse_tree,
    )


def _selfplay_settings(config: MiniGoConfig) -> SelfPlaySettings:
    return SelfPlaySettings(
        parallel_games=config.parallel_games,
        opening=config.selfplay_opening,
        move_limit=config.move_limit,
        soft_moves=config.soft_moves,
        soft_exponent=config.soft_exponent,
        resign_threshold=config.resign_threshold,
        disable_resign_share=config.disable_resign_share,
        holdout_share=config.holdout_share,
        train_filter=config.train_filter,
        random_symmetry=config.random_symmetry,
    )
