"""The workload as core's loop sees it: model, optimizer, batches, loss and evaluation, from one configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from mlperf_logging.mllog import constants
from torch import Tensor, nn

from core.api.data import EpochSampler, eval_cadence, eval_share
from core.api.errors import UsageError
from core.api.reference import LAMB, parameter_groups
from core.api.seams import TENSOR_PLAN
from core.api.types import Batch, Capture, Forward, Outputs, RunContext, Target, WorkloadSpec
from timetrial_bert import checkpoints, model
from timetrial_bert.articles import Articles
from timetrial_bert.batch import collate
from timetrial_bert.schedule import Schedule
from timetrial_bert.seams import ENCODER, IGNORED, MLM_LOSS, TENSOR_PARALLEL, TENSOR_PARALLEL_DROPOUT

if TYPE_CHECKING:
    from timetrial_bert.config import BertConfig
    from timetrial_bert.shards import Shards

METRIC = "masked_lm_accuracy"
CADENCE_SLOPE, CADENCE_OFFSET, CADENCE_UNIT = 230.23, 3_000_000, 25_000
"""v1.1 rules, bert: evaluate every floor(0.05 * (230.23 * batch size + 3,000,000), 25,000) samples."""


class BertWorkload:
    """Masked-LM and next-sentence pre-training. `timetrial_bert.batch` documents `Batch.data`."""

    def __init__(self, spec: WorkloadSpec, config: BertConfig, ctx: RunContext) -> None:
        self.spec, self.config, self.ctx = spec, config, ctx
        if config.max_positions < config.sequence_length:
            raise UsageError(
                f"workload.sequence_length={config.sequence_length} needs workload.max_positions at least as large"
            )
        self.targets = [Target(METRIC, config.targets[METRIC])]
        self.eval_cadence = eval_cadence(config.eval, closed_cadence(config.global_batch_size), "samples")
        self.capture = Capture(step=True)
        self.max_epochs, self.global_batch_size = config.max_epochs, config.global_batch_size

    # ------------------------------------------------------------------------------------------------------- data

    @property
    def train_samples(self) -> int:
        return 0 if self.ctx.synthetic else self.examples.train_samples

    @property
    def eval_samples(self) -> int:
        return 0 if self.ctx.synthetic else self.examples.eval_samples

    @cached_property
    def examples(self) -> Articles | Shards:
        """First asked for by `check_data`: synthetic data needs none."""
        if self.config.embedded_data == "articles" and not self.ctx.config.data.root:
            return Articles(self.config, self.ctx)
        from timetrial_bert.shards import Shards  # imports datasets, for a second

        return Shards(self.config, self.ctx)

    def check_data(self) -> None:
        self.examples.check()
        _ = self._sampler  # a data set smaller than one global batch is an error before the clock, too

    def _sampler_of(self, rank: int, world_size: int) -> EpochSampler:
        return EpochSampler(
            examples=self.train_samples, global_batch=self.global_batch_size, rank=rank, world_size=world_size
        )

    @cached_property
    def _sampler(self) -> EpochSampler:
        """First asked for when the data set's size is known."""
        return self._sampler_of(self.ctx.data_rank, self.ctx.data_size)

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """In host memory. Each rank knows the global batch, and so its number of predictions, for `mlm_scale`."""
        config, seed = self.config, self.ctx.seed_for("shuffle", epoch)
        everyone = self._sampler_of(0, 1).epoch(seed, first_batch)
        for mine, whole in zip(self._sampler.epoch(seed, first_batch), everyone, strict=True):
            scale = whole.samples / int(self.examples.prediction_counts(whole.indices).sum())
            examples = self.examples.train(mine.indices, epoch)
            data = collate(examples, config.sequence_length, config.max_predictions, scale)
            yield Batch(data, mine.samples, mine.weight)

    def example_batches(self) -> Iterator[Batch]:
        """Random tokens, the same number of them on every rank; as many rows of each length as chance has it."""
        config, size = self.config, self.global_batch_size // self.ctx.data_size
        generator = torch.Generator().manual_seed(self.ctx.seed_for("synthetic", self.ctx.data_rank))
        length, spread = config.sequence_length, min(config.synthetic_fill, 1 - config.synthetic_fill)
        fill = config.synthetic_fill + spread * (2 * torch.rand(size, generator=generator) - 1)
        lengths = (fill * length).round().long().clamp(min(8, length), length)
        within = torch.arange(length) < lengths[:, None]
        ids = torch.randint(config.vocab_size, (size, length), generator=generator) * within
        types = (torch.arange(length) >= lengths[:, None] // 2) & within
        scores = torch.rand(size, length, generator=generator).masked_fill(~within, -1)
        predictions = min(config.max_predictions, length)
        positions = scores.topk(predictions).indices.sort().values
        counts = (lengths * config.masked_share).round().long().clamp(1, predictions)
        used = torch.arange(predictions) < counts[:, None]
        labels = torch.randint(config.vocab_size, (size, predictions), generator=generator)
        data = {
            "input_ids": ids,
            "token_type_ids": types.long(),
            "attention_mask": within,
            "masked_positions": positions * used,
            "masked_labels": labels.masked_fill(~used, IGNORED),
            "next_sentence_labels": torch.randint(2, (size,), generator=generator),
            "mlm_scale": torch.full((size,), size / int(counts.sum())),
        }
        yield Batch({name: t.to(self.ctx.device) for name, t in data.items()}, size * self.ctx.data_size)

    # ------------------------------------------------------------------------------------------ model and optimizer

    def build_model(self) -> nn.Module:
        config = self.config
        network = model.network_config(
            config.size,
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            dropout=config.dropout,
            attention=config.attn_implementation,
            init_std=config.init_std,
        )
        encode = self.ctx.offer(ENCODER, model.encode)
        mlm_loss = self.ctx.offer(MLM_LOSS, model.mlm_loss)
        self.ctx.offer(TENSOR_PLAN, {**TENSOR_PARALLEL, **(TENSOR_PARALLEL_DROPOUT if config.dropout else {})})
        built = model.PreTraining(network, encode, mlm_loss)
        model.initialise(built, torch.Generator().manual_seed(self.ctx.seed_for("init")))
        if config.init_checkpoint and not self.ctx.synthetic:
            checkpoints.load(built.network, config.init_checkpoint)
        return built

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.network.bert.encoder.layer)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        groups = parameter_groups(model, config.weight_decay)
        betas = (config.beta_1, config.beta_2)
        if config.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=config.base_learning_rate, betas=betas, eps=config.epsilon)
        groups[1]["adapt"] = False  # reference: exclude_from_weight_decay, which LAMB takes for its adaptation, too
        return LAMB(
            groups,
            lr=config.base_learning_rate,
            betas=betas,
            eps=config.epsilon,
            bias_correction=config.bias_correction,
            max_grad_norm=config.max_grad_norm,
        )

    def learning_rate(self, step: int) -> float:
        return self._schedule(step)

    @cached_property
    def _schedule(self) -> Schedule:
        config = self.config
        return Schedule(
            base=config.base_learning_rate,
            warmup_steps=config.lr_warmup_steps,
            start_warmup_step=config.lr_warmup_start_step,
            training_steps=config.training_steps,
            power=config.poly_power,
        )

    # ------------------------------------------------------------------------------------------ loss and evaluation

    def loss(self, model: nn.Module, data: dict[str, Tensor]) -> Outputs:
        return model(data)

    def infer(self, model: nn.Module, data: dict[str, Tensor]) -> Outputs:
        """The sums that `PreTraining` gives in evaluation."""
        return model(data)

    def evaluate(self, infer: Forward) -> dict[str, float]:
        """Of the masked tokens how many are predicted, as the reference counts (run_pretraining.py, metric_fn)."""
        names = ("correct", "masked", "next_correct", "examples", "mlm_loss_sum")
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.ctx.device)
        for data in self.ctx.feed(self._eval_batches()):
            found = infer(data)
            sums += torch.stack([found[name].double() for name in names])
        ranks = self.ctx.gather(sums.tolist())
        total = dict(zip(names, (sum(column) for column in zip(*ranks, strict=True)), strict=True))
        return {
            METRIC: total["correct"] / total["masked"],
            "masked_lm_loss": total["mlm_loss_sum"] / total["masked"],
            "next_sentence_accuracy": total["next_correct"] / total["examples"],
        }

    def _eval_batches(self) -> Iterable[dict[str, Tensor]]:
        config = self.config
        mine = eval_share(self.eval_samples, self.ctx.data_rank, self.ctx.data_size)
        size = config.eval.batch_size or config.global_batch_size
        for start in range(mine.start, mine.stop, size):
            examples = self.examples.evaluation(range(start, min(start + size, mine.stop)))
            yield collate(examples, config.sequence_length, config.max_predictions, 1.0)

    # --------------------------------------------------------------------------------------------- log and checkpoint

    def log_values(self) -> Mapping[str, Any]:
        """v1.1 rules, compliance_checker/training_1.1.0/closed_bert.yaml."""
        config = self.config
        return {
            constants.OPT_NAME: config.optimizer,
            constants.OPT_BASE_LR: config.base_learning_rate,
            "opt_epsilon": config.epsilon,
            constants.OPT_LR_TRAINING_STEPS: config.training_steps,
            constants.OPT_LR_WARMUP_STEPS: config.lr_warmup_steps,
            constants.NUM_WARMUP_STEPS: config.lr_warmup_steps,
            constants.START_WARMUP_STEP: config.lr_warmup_start_step,
            constants.OPT_LAMB_BETA_1: config.beta_1,
            constants.OPT_LAMB_BETA_2: config.beta_2,
            constants.OPT_LAMB_WEIGHT_DECAY: config.weight_decay,
            constants.OPT_LAMB_LR_DECAY_POLY_POWER: config.poly_power,
            constants.MAX_SEQUENCE_LENGTH: config.sequence_length,
        }

    def weight_names(self, model: Any) -> list[str]:
        """As the reference's TensorFlow checkpoint has them, whatever the size."""
        return [checkpoints.tf_name(name) for name, _ in model.network.named_parameters()]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def closed_cadence(batch_size: int) -> int:
    """Samples between two evaluations in the v1.1 rules."""
    return int(0.05 * (CADENCE_SLOPE * batch_size + CADENCE_OFFSET)) // CADENCE_UNIT * CADENCE_UNIT
