"""What can be set under `workload`: types, ranges and meaning. Imports without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from core.api.config import EvalConfig, checked
from core.api.errors import UsageError


@dataclass(kw_only=True)
class MiniGoConfig:
    """`conf/workload/*.yaml` holds the values of the two options."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "target": "targets.win_rate",
        "eval_every": "eval.every",
        "eval_first": "eval.first",
    }

    size: int = checked(at_least=2, at_most=19)
    """Points on a side of the board."""
    komi: float = checked(at_least=-400, at_most=400)
    suicide: bool
    """Whether a chain of two or more stones may take its own last liberty."""
    move_limit: int = checked(at_least=1)
    """A game ends after this number of moves, and is scored as it stands."""

    history: int = checked(at_least=1, at_most=8)
    """Positions that the network sees: the present one and those before it."""
    width: int = checked(at_least=1)
    blocks: int = checked(at_least=0)
    """Channels and residual blocks of the trunk."""
    policy_channels: int = checked(at_least=1)
    value_channels: int = checked(at_least=1)
    value_hidden: int = checked(at_least=1)
    sync_batch_norm: bool
    """Normalise over the global batch, so that several ranks compute what one would; else each over its own share."""

    games: int = checked(at_least=1)
    """Of self-play, in a generation; over all ranks."""
    parallel_games: int = checked(at_least=1)
    """Of a rank, played side by side."""
    selfplay_opening: int = checked(at_least=0)
    """Most random stones that a game of self-play begins with (1 to this number); 0: an empty board."""
    simulations: int = checked(at_least=1)
    """Descents of the search for each move (readouts)."""
    method: str = checked(choices=("puct", "gumbel"))
    c_puct_base: float = checked(above=0)
    c_puct_init: float = checked(at_least=0)
    value_init_penalty: float = checked(at_least=0, at_most=2)
    """puct: a move without visits is worth its position's value less this; 0 is as good as the position, 2 a loss."""
    noise_alpha: float = checked(above=0)
    """puct: the parameter of the root's Dirichlet noise is this divided by the number of points."""
    noise_fraction: float = checked(at_least=0, at_most=1)
    """puct: share of the noise in the root's priors."""
    virtual_losses: int = checked(at_least=1)
    """Leaves of one game that the network sees in one call."""
    reuse_tree: bool
    random_symmetry: bool
    """The search shows the network each position under one of the board's eight symmetries, drawn at random."""
    soft_moves: int = checked(at_least=0)
    """The first moves of a game, drawn from the visits to the power of `soft_exponent`; later ones are the best."""
    soft_exponent: float = checked(above=0)
    resign_threshold: float = checked(at_least=-1, at_most=0)
    """A player resigns whose search values the position below this; -1: never."""
    disable_resign_share: float = checked(at_least=0, at_most=1)
    """Of games in which nobody resigns."""
    holdout_share: float = checked(at_least=0, at_most=0.99)
    """Of games that are not trained on."""
    train_filter: float = checked(above=0, at_most=1)
    """Share of a generation's positions that enters the window."""

    window: int = checked(at_least=1)
    """Recent generations that are trained on."""
    epoch_examples: int = checked(at_least=1)
    """Training examples in an epoch, drawn from the window; a multiple of the batch size."""
    global_batch_size: int = checked(at_least=2)
    max_epochs: int = checked(at_least=1)
    """Generations."""
    learning_rates: list[float]
    learning_rate_steps: list[int]
    """The steps at which the next of the learning rates takes over: one fewer than there are rates."""
    momentum: float = checked(at_least=0, at_most=1)
    weight_decay: float = checked(at_least=0)
    """L2 regularisation, of all parameters but biases and shifts."""
    value_weight: float = checked(at_least=0)
    """Of the value's squared error, against the policy's cross-entropy."""

    targets: dict[str, float] = checked(keys=("win_rate",), above=0, at_most=1)
    """Win rate in evaluation."""
    eval: EvalConfig
    """`every: null` is one epoch. The games of an evaluation are played side by side: `batch_size` is null."""
    opponent: str = checked(choices=("open_spiel", "checkpoint"))
    """`open_spiel`: its MCTS bot with random rollouts; `checkpoint`: another trained network, with search."""
    target_checkpoint: str | None
    """opponent=checkpoint: a run folder of this project, or a safetensors file of the network's parameters."""
    eval_games: int = checked(at_least=1)
    eval_opening: int = checked(at_least=0)
    """As `selfplay_opening`, for evaluation; each opening is played twice, with colours swapped."""
    eval_simulations: int = checked(at_least=0)
    """Of our side, and of a checkpoint; 0: the network's first choice is played, without search."""
    opponent_simulations: int = checked(at_least=2)
    opponent_rollouts: int = checked(at_least=1)
    """opponent=open_spiel: simulations for each move, and random games that evaluate a leaf."""
    uct_c: float = checked(above=0)
    """opponent=open_spiel: its exploration constant."""
    save_games: int = checked(at_least=0)
    """Games of each evaluation that are kept in the run folder, as SGF."""


def refuse_contradictions(config: MiniGoConfig) -> None:
    """UsageError for settings that do not go together."""
    batch = config.global_batch_size
    if config.epoch_examples % batch:
        multiple = -(-config.epoch_examples // batch) * batch
        what = f"workload.epoch_examples={config.epoch_examples} is not a multiple of workload.global_batch_size"
        raise UsageError(f"{what}: try {multiple}")
    rates, steps = config.learning_rates, config.learning_rate_steps
    if len(rates) != len(steps) + 1 or min(rates) <= 0 or list(steps) != sorted(steps):
        what = f"workload.learning_rates={list(rates)} and workload.learning_rate_steps={list(steps)} do not fit"
        raise UsageError(f"{what}: give one positive rate more than there are steps, and the steps in order")
    if config.eval.batch_size is not None:
        raise UsageError("workload.eval.batch_size: the games of an evaluation are played side by side; leave it null")
    if max(config.selfplay_opening, config.eval_opening) > config.size**2 // 2:
        raise UsageError(
            f"openings of more than {config.size**2 // 2} random stones do not fit on {config.size}x{config.size}"
        )
    if config.suicide and config.opponent == "open_spiel":
        raise UsageError("open_spiel forbids suicide: set workload.suicide=false, or workload.opponent=checkpoint")
    if config.method == "gumbel" and (config.soft_moves or config.virtual_losses > 1 or config.reuse_tree):
        what = "workload.method=gumbel draws its moves itself and counts every visit"
        raise UsageError(f"{what}: set workload.soft_moves=0 workload.virtual_losses=1 workload.reuse_tree=false")
