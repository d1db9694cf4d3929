"""The workload as core's loop sees it: model, optimizer, batches, loss and evaluation, from one configuration."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from core.data import EpochSampler
from core.types import Batch, EvalCadence, Forward, Outputs, RunContext, Target, WorkloadSpec
from timetrial_maskrcnn import digits, evaluation
from timetrial_maskrcnn.batch import collate
from timetrial_maskrcnn.model import MaskRCNN
from timetrial_maskrcnn.regions import offered
from timetrial_maskrcnn.scenes import SIDE, Scenes

if TYPE_CHECKING:
    from timetrial_maskrcnn.plugin import MaskRCNNConfig


class MaskRCNNWorkload:
    """Detection and segmentation. `Batch.data` is described in `timetrial_maskrcnn.batch`."""

    def __init__(self, spec: WorkloadSpec, config: MaskRCNNConfig, ctx: RunContext) -> None:
        self.spec, self.config, self.ctx = spec, config, ctx
        self.targets = [
            Target("box_ap", config.box_target, log_name="BBOX"),
            Target("mask_ap", config.mask_target, log_name="SEGM"),
        ]
        self.eval_cadence = EvalCadence(every=config.eval_every_epochs, first=config.eval_first_epoch)
        self.max_epochs, self.global_batch_size = config.max_epochs, config.global_batch_size
        self.train, self.eval = Scenes(config.train_scenes, False), Scenes(config.eval_scenes, True)

    # ------------------------------------------------------------------------------------------------------- data

    @property
    def train_samples(self) -> int:
        return len(self.train)

    @property
    def eval_samples(self) -> int:
        return len(self.eval)

    def check_data(self) -> None:
        digits.find()
        _ = self._sampler  # a data set smaller than one global batch is an error before the clock, too

    @cached_property
    def _sampler(self) -> EpochSampler:
        return EpochSampler(
            examples=self.train_samples, global_batch=self.global_batch_size, rank=self.ctx.rank,
            world_size=self.ctx.world_size,
        )  # fmt: skip

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        for share in self._sampler.epoch(self.ctx.seed_for("shuffle", epoch), first_batch):
            examples = [self.train.example(i, self.ctx.seed_for("sample", epoch, i)) for i in share.indices.tolist()]
            yield Batch(collate(examples, self.train.objects), share.samples, share.weight)

    def synthetic_batch(self) -> Batch:
        """Noise with one object in the middle of each image."""
        size, scenes = self.global_batch_size // self.ctx.world_size, self.train
        generator = torch.Generator().manual_seed(self.ctx.seed_for("synthetic", self.ctx.rank))
        middle = (SIDE // 4, SIDE // 4, 3 * SIDE // 4, 3 * SIDE // 4)
        data = {
            "images": torch.randn(size, scenes.channels, SIDE, SIDE, generator=generator),
            "sizes": torch.full((size, 2), SIDE),
            "boxes": torch.zeros(size, scenes.objects, 4),
            "labels": torch.zeros(size, scenes.objects, dtype=torch.int64),
            "masks": torch.zeros(size, scenes.objects, SIDE, SIDE, dtype=torch.uint8),
            "seeds": torch.arange(size),
            "ids": torch.arange(size),
            "originals": torch.full((size, 2), SIDE),
        }
        data["boxes"][:, 0], data["labels"][:, 0] = torch.tensor(middle, dtype=torch.float32), 1
        data["masks"][:, 0, middle[1] : middle[3], middle[0] : middle[2]] = 1
        return Batch({k: v.to(self.ctx.device) for k, v in data.items()}, size * self.ctx.world_size)

    # ------------------------------------------------------------------------------------------ model and optimizer

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.ctx.seed_for("init"))
            return MaskRCNN(self.config, self.train.channels, self.train.classes, offered(self.ctx.component))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)]

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [
            {"params": weights, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=self.config.base_learning_rate, momentum=self.config.momentum)

    def learning_rate(self, step: int) -> float:
        """A straight line up, then steps down (the reference's WarmupMultiStepLR)."""
        config = self.config
        warm = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
        risen = config.warmup_factor + (1 - config.warmup_factor) * warm
        return config.base_learning_rate * risen * config.decay_factor ** bisect.bisect_right(config.decay_steps, step)

    # ------------------------------------------------------------------------------------------ loss and evaluation

    def loss(self, model: nn.Module, data: dict[str, Tensor]) -> Outputs:
        return model(data)

    def infer(self, model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return model(data)

    def evaluate(self, infer: Forward) -> dict[str, float]:
        """Box and mask AP over the evaluation set; detections and annotations go to the run folder's `detections/`."""
        categories, mine = [c["id"] for c in self.eval.categories], list[dict[str, Any]]()
        for data in self.ctx.feed(self._eval_batches()):
            mine += evaluation.records(infer(data), data, categories)
        found, quality = evaluation.gathered(mine, self.ctx.world_size), dict[str, float]()
        if self.ctx.rank == 0:
            annotations = self.eval.annotations()
            evaluation.write(self.ctx.run_dir / "detections", annotations, found)
            quality = evaluation.average_precision(annotations, found)
        return self.ctx.backend.broadcast(quality)

    def _eval_batches(self) -> Iterator[dict[str, Tensor]]:
        """Every `world_size`-th batch. Ranks share out whole batches, since a kernel's last bits depend on the batch."""
        size, ctx = self.config.eval_batch_size, self.ctx
        for start in range(ctx.rank * size, self.eval_samples, ctx.world_size * size):
            numbers = range(start, min(start + size, self.eval_samples))
            yield collate([self.eval.example(number) for number in numbers], self.eval.objects)

    # --------------------------------------------------------------------------------------------- log and checkpoint

    def log_values(self) -> Mapping[str, Any]:
        """v1.1 rules, compliance_checker/training_1.1.0/closed_maskrcnn.yaml."""
        config = self.config
        return {
            "opt_base_learning_rate": config.base_learning_rate,
            "opt_learning_rate_warmup_steps": config.warmup_steps,
            "opt_learning_rate_warmup_factor": config.warmup_factor,
            "opt_learning_rate_decay_factor": config.decay_factor,
            "opt_learning_rate_decay_steps": list(config.decay_steps),
            "num_image_candidates": config.proposals_train,
            "min_image_size": SIDE,
            "max_image_size": SIDE,
        }

    def weight_names(self, model: nn.Module) -> list[str]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All that training draws is a function of seed, epoch and image."""
