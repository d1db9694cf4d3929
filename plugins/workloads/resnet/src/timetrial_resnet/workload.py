"""The workload as core's loop sees it: model, optimizer, batches, loss and evaluation, from one configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mlperf_logging.mllog import constants
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from core.api.data import EpochSampler, eval_cadence
from core.api.reference import LARS, parameter_groups
from core.api.types import Batch, Capture, Forward, Outputs, RunContext, Target, WorkloadSpec
from timetrial_resnet.augment import Augmentation
from timetrial_resnet.idx import DEBIAN_FASHION_MNIST
from timetrial_resnet.imagefolder import IGNORED, ImageFolder, refuse_too_many
from timetrial_resnet.model import ResNet, closed_names, initialise
from timetrial_resnet.norm import batch_norm
from timetrial_resnet.schedule import Schedule
from timetrial_resnet.smallimages import SmallImages

if TYPE_CHECKING:
    from timetrial_resnet.config import ResNetConfig

METRIC = "top1"
CLOSED_NAMES_OF = "resnet50"
MIN_PER_RANK = 2
"""Batch normalisation over one value per channel is undefined, and that is what one 1 x 1 map per rank would be."""


class ResNetWorkload:
    """Image classification. `Batch.data` is (images [B, C, H, W] float32, labels [B] int64), on the device."""

    def __init__(self, spec: WorkloadSpec, config: ResNetConfig, ctx: RunContext) -> None:
        self.spec, self.config, self.ctx = spec, config, ctx
        self.targets = [Target(METRIC, config.targets[METRIC])]
        self.eval_cadence = eval_cadence(config.eval)
        self.capture = Capture(step=True)
        self.max_epochs, self.global_batch_size = config.max_epochs, config.global_batch_size
        root = Path(ctx.config.data.root).expanduser() if ctx.config.data.root else None
        self.images: SmallImages | ImageFolder
        embedded = config.embedded_data == "digits" and root is None
        if config.data_format == "imagefolder" and not embedded:
            self.images = ImageFolder(ctx, root, config.image_size, config.classes, config.flip)
        else:
            augmentation = Augmentation(
                max_shift=config.max_shift,
                max_rotation=config.max_rotation,
                max_scale=config.max_scale,
                flip=config.flip,
            )
            folder = None if embedded else root or DEBIAN_FASHION_MNIST
            self.images = SmallImages(ctx, folder, config.image_size, config.classes, augmentation)

    # ------------------------------------------------------------------------------------------------------- data

    @property
    def train_samples(self) -> int:
        return self.images.train_samples

    @property
    def eval_samples(self) -> int:
        return self.images.eval_samples

    def check_data(self) -> None:
        self.images.check()
        _ = self._sampler  # a data set smaller than one global batch is an error before the clock, too

    @cached_property
    def _sampler(self) -> EpochSampler:
        """First asked for when the data set's size is known."""
        return EpochSampler(
            examples=self.train_samples,
            global_batch=self.global_batch_size,
            rank=self.ctx.data_rank,
            world_size=self.ctx.data_size,
            min_per_rank=MIN_PER_RANK,
        )

    def batches(self, epoch: int, first_batch: int) -> Iterable[Batch]:
        return self.images.batches(self._sampler, epoch, first_batch)

    def example_batches(self) -> Iterator[Batch]:
        """Noise of the images' deviation 1, and labels that belong to nothing."""
        size, images = self.global_batch_size // self.ctx.data_size, self.images
        generator = torch.Generator(self.ctx.device).manual_seed(self.ctx.seed_for("synthetic", self.ctx.data_rank))
        options: Any = {"device": self.ctx.device, "generator": generator}
        pixels = torch.randn(size, images.channels, images.size, images.size, **options)
        yield Batch((pixels, torch.randint(images.classes, (size,), **options)), size * self.ctx.data_size)

    # ------------------------------------------------------------------------------------------ model and optimizer

    def build_model(self) -> nn.Module:
        config = self.config
        model = ResNet(
            config.arch,
            width=config.width,
            stem=config.stem,
            channels=self.images.channels,
            classes=self.images.classes,
            norm=batch_norm(config.sync_batch_norm and self.ctx.data_size > 1, self.ctx.device),
        )
        generator = torch.Generator().manual_seed(self.ctx.seed_for("init"))
        initialise(model, config.init, config.zero_init_residual, generator)
        return model

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)]

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        groups = parameter_groups(model, config.weight_decay)
        if config.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=config.base_learning_rate, momentum=config.momentum)
        groups[1]["adapt"] = False
        return LARS(
            groups,
            lr=config.base_learning_rate,
            momentum=config.momentum,
            eeta=config.lars_eeta,
            epsilon=config.lars_epsilon,
        )

    def learning_rate(self, step: int) -> float:
        return self._schedule(step)

    @cached_property
    def _schedule(self) -> Schedule:
        config = self.config
        steps_per_epoch = self._sampler.batches
        warmup = config.lr_warmup_epochs * steps_per_epoch
        rest = max(1, math.ceil(config.max_epochs * steps_per_epoch - warmup))
        return Schedule(
            family=config.schedule,
            base=config.base_learning_rate,
            end=config.end_learning_rate,
            warmup_steps=warmup,
            decay_steps=config.lr_decay_steps or rest,
            power=config.poly_power,
        )

    # ------------------------------------------------------------------------------------------ loss and evaluation

    def loss(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> Outputs:
        """Cross-entropy with label smoothing (Szegedy et al. 2016, section 7), over the readable local images."""
        images_BCHW, labels_B = data
        total = F.cross_entropy(
            model(images_BCHW),
            labels_B,
            reduction="sum",  # a mean over no readable image would be 0 / 0
            label_smoothing=self.config.label_smoothing,
            ignore_index=IGNORED,
        )
        return {"loss": total / (labels_B != IGNORED).sum().clamp_min(1)}

    def infer(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        """Logits [B, classes]."""
        return model(data[0])

    def evaluate(self, infer: Forward) -> dict[str, float]:
        """Top-1 accuracy. An unreadable image counts as wrong."""
        correct = torch.zeros((), dtype=torch.int64, device=self.ctx.device)
        size = self.config.eval.batch_size or self.global_batch_size
        for data in self.ctx.feed(self.images.eval_batches(size)):
            correct += (infer(data).argmax(1) == data[1]).sum()
        counts = self.ctx.gather([float(correct), *self._bad_examples()])
        self._agree_on_bad([int(number) for row in counts for number in row[1:] if number >= 0])
        return {METRIC: sum(row[0] for row in counts) / self.eval_samples}

    def _bad_examples(self) -> list[float]:
        """This rank's unreadable examples in a list of the same length on every rank, filled up with -1. No rank holds
        more than are allowed: it would have stopped."""
        numbers = [float(n) for n in self.images.bad]
        return numbers + [-1.0] * (self.ctx.config.data.max_bad - len(numbers))

    def _agree_on_bad(self, numbers: list[int]) -> None:
        """Every rank learns of all unreadable examples, and stops if they are too many together."""
        if isinstance(self.images, ImageFolder):
            names = [self.images.path(n) for n in sorted(set(numbers))]
            self.ctx.figures["bad_examples"] = names
            refuse_too_many(names, self.ctx.config.data.max_bad)

    # --------------------------------------------------------------------------------------------- log and checkpoint

    def log_values(self) -> Mapping[str, Any]:
        """v1.1 rules, compliance_checker/training_1.1.0/closed_resnet{,_lars,_sgd}.yaml."""
        config, schedule = self.config, self._schedule
        span = self.global_batch_size if config.sync_batch_norm else self.global_batch_size // self.ctx.data_size
        kind = config.optimizer
        values: dict[str, Any] = {
            constants.OPT_NAME: kind,
            constants.MODEL_BN_SPAN: span,
            f"{kind}_opt_base_learning_rate": config.base_learning_rate,
            f"{kind}_opt_end_learning_rate": config.end_learning_rate,
            f"{kind}_opt_learning_rate_decay_poly_power": config.poly_power,
            f"{kind}_opt_learning_rate_decay_steps": schedule.decay_steps,
            f"{kind}_opt_momentum": config.momentum,
            f"{kind}_opt_weight_decay": config.weight_decay,
        }
        if kind == "lars":
            values[constants.LARS_EPSILON] = config.lars_epsilon
            values[constants.LARS_OPT_LEARNING_RATE_WARMUP_EPOCHS] = config.lr_warmup_epochs
        else:
            values[constants.OPT_LR_WARMUP_EPOCHS] = config.lr_warmup_epochs
        return values

    def weight_names(self, model: nn.Module) -> list[str]:
        return closed_names(model) if self.config.arch == CLOSED_NAMES_OF else []

    def state_dict(self) -> dict[str, Any]:
        return {"bad": dict(self.images.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images.bad.update({int(number): name for number, name in state["bad"].items()})
