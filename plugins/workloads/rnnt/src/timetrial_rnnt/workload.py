"""The workload as core's loop sees it: model, optimizer, batches, loss and evaluation, from one configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jiwer
import numpy as np
import torch
from mlperf_logging.mllog import constants
from numpy.typing import NDArray
from torch import Tensor, nn

from core.api.data import eval_cadence
from core.api.errors import UsageError
from core.api.reference import LAMB
from core.api.types import Batch, Capture, Forward, Outputs, RunContext, Target, WorkloadSpec
from timetrial_rnnt import features, layers, model
from timetrial_rnnt.batch import Corpus, Reader
from timetrial_rnnt.buckets import BucketSampler
from timetrial_rnnt.ema import AverageWeights
from timetrial_rnnt.loss import transducer_loss
from timetrial_rnnt.schedule import Schedule
from timetrial_rnnt.seams import TRANSDUCER_LOSS
from timetrial_rnnt.spoken import SpokenDigits
from timetrial_rnnt.text import Letters

if TYPE_CHECKING:
    from timetrial_rnnt.config import RnntConfig

METRIC = "word_error_rate"


class RnntWorkload:
    """Speech recognition. `timetrial_rnnt.batch` documents `Batch.data`."""

    def __init__(self, spec: WorkloadSpec, config: RnntConfig, ctx: RunContext) -> None:
        self.spec, self.config, self.ctx = spec, config, ctx
        if config.speed_min > config.speed_max:
            raise UsageError(f"workload.speed_min={config.speed_min} is above workload.speed_max={config.speed_max}")
        if config.tokens == "letters" and config.vocab_size != Letters.size:
            raise UsageError(f"workload.tokens=letters needs workload.vocab_size={Letters.size}")
        self.targets = [Target(METRIC, config.targets[METRIC], higher_is_better=False)]
        self.eval_cadence = eval_cadence(config.eval)
        self.capture = Capture(parts=("encoder",))
        self.max_epochs, self.global_batch_size = config.max_epochs, config.global_batch_size
        self.corpus = self._corpus()
        self.reader = Reader(config, ctx, self.corpus)
        self.average: AverageWeights | None = None
        """Of the weights, where `workload.ema` asks for it; the plugin keeps it up to date."""

    # ------------------------------------------------------------------------------------------------------- data

    @property
    def train_samples(self) -> int:
        return 0 if self.ctx.synthetic else self.corpus.train_samples

    @property
    def eval_samples(self) -> int:
        return 0 if self.ctx.synthetic else self.corpus.eval_samples

    def _corpus(self) -> Corpus:
        if self.config.embedded_data == "digits" and not self.ctx.config.data.root:
            return SpokenDigits(self.config, self.ctx)
        from timetrial_rnnt.prepared import PreparedSpeech

        return PreparedSpeech(self.config, self.ctx)

    def check_data(self) -> None:
        self.corpus.check()
        _ = self._sampler  # a data set smaller than one global batch is an error before the clock, too

    @cached_property
    def _sampler(self) -> BucketSampler:
        """First asked for when the data set is known."""
        return BucketSampler(
            durations=self.corpus.durations("train"),
            buckets=self.config.buckets,
            global_batch=self.global_batch_size,
            rank=self.ctx.data_rank,
            world_size=self.ctx.data_size,
        )

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        shares = list(self._sampler.epoch(self.ctx.seed_for("shuffle", epoch), first_batch))
        read = self.reader.train((share.indices for share in shares), self.ctx.seed_for("augment", epoch))
        for share, data in zip(shares, read, strict=True):
            yield Batch(data, share.samples, share.weight)

    def example_batches(self) -> Iterator[Batch]:
        """First noise of `synthetic_seconds` with random labels, in which every utterance is as long as its row. Then
        one for each T that a full batch of training can have: those between the shortest utterance at the highest speed
        and the longest at the lowest, the longest first. These have one label, which the encoder does not see."""
        config = self.config
        yield self._noise(
            self._padded_frames(math.ceil(config.synthetic_seconds * features.RATE)), config.synthetic_labels
        )
        if self.ctx.synthetic:
            return
        samples = np.rint(self.corpus.durations("train") * features.RATE)
        longest = features.samples_at(int(samples.max()), round(100 * config.speed_min))
        shortest = features.samples_at(int(samples.min()), round(100 * config.speed_max))
        if config.trim_silence_db is not None:
            shortest = 1
        step = config.pad_frames_to
        for frames in range(self._padded_frames(longest), self._padded_frames(shortest) - 1, -step):
            yield self._noise(frames, labels=1)

    def _padded_frames(self, samples: int) -> int:
        """T of a batch whose longest utterance has `samples` samples."""
        return features.spliced_count(
            features.frame_count(samples), self.config.splice_frames, self.config.pad_frames_to
        )

    def _noise(self, frames: int, labels: int) -> Batch:
        """A full batch on the device, of utterances with this number of spliced frames and labels each."""
        config, size = self.config, self.global_batch_size // self.ctx.data_size
        generator = torch.Generator().manual_seed(self.ctx.seed_for("synthetic", self.ctx.data_rank))
        data = {
            "features": torch.randn(size, frames, config.splice_frames * config.mels, generator=generator),
            "feature_lengths": torch.full((size,), frames),
            "labels": torch.randint(config.vocab_size, (size, labels), generator=generator),
            "label_lengths": torch.full((size,), labels),
        }
        return Batch({name: t.to(self.ctx.device) for name, t in data.items()}, size * self.ctx.data_size)

    # ------------------------------------------------------------------------------------------ model and optimizer

    def build_model(self) -> nn.Module:
        config = self.config
        sizes = layers.Sizes(
            features=config.splice_frames * config.mels,
            classes=config.vocab_size + 1,
            encoder_hidden=config.encoder_hidden,
            pre_layers=config.pre_layers,
            post_layers=config.post_layers,
            stack_time=config.stack_time,
            predictor_hidden=config.predictor_hidden,
            predictor_layers=config.predictor_layers,
            joint_hidden=config.joint_hidden,
            encoder_dropout=config.encoder_dropout,
            predictor_dropout=config.predictor_dropout,
            joint_dropout=config.joint_dropout,
        )
        built = model.Transducer(
            sizes,
            self.ctx.offer(TRANSDUCER_LOSS, transducer_loss),
            max_symbols=config.max_symbols,
            max_per_frame=config.max_symbols_per_frame,
        )
        model.initialise(built, config.init_scale, torch.Generator().manual_seed(self.ctx.seed_for("init")))
        return built

    def blocks(self, model: Any) -> list[nn.Module]:
        return [model.encoder.pre_rnn, model.encoder.post_rnn, model.prediction.rnn]

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        return LAMB(
            model.parameters(),
            lr=config.base_learning_rate,
            betas=(config.beta_1, config.beta_2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )

    def learning_rate(self, step: int) -> float:
        return self._schedule(step)

    @cached_property
    def _schedule(self) -> Schedule:
        config = self.config
        return Schedule(
            base=config.base_learning_rate,
            minimum=config.min_learning_rate,
            steps_per_epoch=1 if self.ctx.synthetic else self._sampler.batches,
            warmup_epochs=config.lr_warmup_epochs,
            hold_epochs=config.hold_epochs,
            decay=config.decay_per_epoch,
        )

    # ------------------------------------------------------------------------------------------ loss and evaluation

    def loss(self, model: nn.Module, data: dict[str, Tensor]) -> Outputs:
        return model(data)

    def infer(self, model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `Transducer` gives in evaluation: the symbols of each utterance, and how many."""
        return model(data)

    def evaluate(self, infer: Forward) -> dict[str, float]:
        """Corpus word error rate: errors over all words of the evaluation set, both counted as integers."""
        jobs = self._eval_jobs()[self.ctx.data_rank :: self.ctx.data_size]
        errors = words = 0
        data = self.ctx.feed(self.reader.evaluation(jobs, self.ctx.seed_for("evaluation")))
        for numbers, utterances in zip(jobs, data, strict=True):
            heard = self.texts(infer(utterances))
            said = [self.corpus.transcript("eval", int(number)) for number in numbers]
            found = jiwer.process_words(said, heard)
            errors += found.substitutions + found.deletions + found.insertions
            words += found.hits + found.substitutions + found.deletions
        counts = self.ctx.gather([float(errors), float(words)])
        errors, words = (sum(column) for column in zip(*counts, strict=True))
        return {METRIC: errors / words}

    def texts(self, found: dict[str, Tensor]) -> list[str]:
        """The text of each utterance that `infer` has recognised."""
        rows = zip(found["symbols"].tolist(), found["counts"].tolist(), strict=True)
        return [self.corpus.tokens.decode(symbols[:count]) for symbols, count in rows]

    def _eval_jobs(self) -> list[NDArray[np.int64]]:
        """The evaluation set in batches of about equal length, the longest first. Ranks take whole ones in turn, so
        what an utterance is computed beside is the same for every number of them."""
        order = np.argsort(-self.corpus.durations("eval"), kind="stable")
        size = self.config.eval.batch_size or self.global_batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    # --------------------------------------------------------------------------------------------- log and checkpoint

    def log_values(self) -> Mapping[str, Any]:
        """v1.1 rules, compliance_checker/training_1.1.0/closed_rnnt.yaml."""
        config = self.config
        return {
            constants.OPT_NAME: "lamb",
            constants.OPT_BASE_LR: config.base_learning_rate,
            constants.OPT_LAMB_EPSILON: config.epsilon,
            constants.OPT_LAMB_LR_DECAY_POLY_POWER: config.decay_per_epoch,
            constants.OPT_LAMB_LR_HOLD_EPOCHS: config.hold_epochs,
            constants.OPT_LAMB_LR_MIN: config.min_learning_rate,
            constants.OPT_LR_WARMUP_EPOCHS: config.lr_warmup_epochs,
            constants.OPT_WEIGHT_DECAY: config.weight_decay,
            constants.OPT_LAMB_BETA_1: config.beta_1,
            constants.OPT_LAMB_BETA_2: config.beta_2,
            constants.OPT_GRADIENT_CLIP_NORM: config.max_grad_norm or math.inf,
            constants.OPT_LR_ALT_DECAY_FUNC: True,
            constants.OPT_LR_ALT_WARMUP_FUNC: True,
            constants.DATA_TRAIN_MAX_DURATION: config.max_duration,
            constants.DATA_TRAIN_NUM_BUCKETS: config.buckets,
            constants.DATA_SPEED_PERTURBATON_MIN: config.speed_min,
            constants.DATA_SPEED_PERTURBATON_MAX: config.speed_max,
            constants.DATA_SPEC_AUGMENT_FREQ_N: config.freq_masks,
            constants.DATA_SPEC_AUGMENT_FREQ_MIN: 0,
            constants.DATA_SPEC_AUGMENT_FREQ_MAX: config.freq_mask_max,
            constants.DATA_SPEC_AUGMENT_TIME_N: config.time_masks,
            constants.DATA_SPEC_AUGMENT_TIME_MIN: 0,
            constants.DATA_SPEC_AUGMENT_TIME_MAX: config.time_mask_max,
            constants.MODEL_EVAL_EMA_FACTOR: config.ema,
            constants.MODEL_WEIGHTS_INITIALIZATION_SCALE: config.init_scale,
            constants.EVAL_MAX_PREDICTION_SYMBOLS: config.max_symbols,
        }

    def weight_names(self, model: nn.Module) -> list[str]:
        return list(CLOSED_NAMES)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict()} if self.average else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.average:
            self.average.load_state_dict(state["average"])


CLOSED_NAMES = ("pre_rnn", "post_rnn", "pred_embed", "dec_rnn", "joint_pred", "joint_enc", "joint_net")
"""The parts that the closed rules want to see initialised."""
