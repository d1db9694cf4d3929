"""The workload as core's loop sees it: model, optimizer, batches, loss and evaluation, from one configuration."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from core.api.data import EpochSampler, eval_cadence
from core.api.errors import DataError
from core.api.preparation import check_manifest
from core.api.reference import parameter_groups
from core.api.types import Batch, Capture, Forward, Outputs, RunContext, Target, WorkloadSpec
from timetrial_maskrcnn import digits, evaluation, weights
from timetrial_maskrcnn.batch import Example, collate
from timetrial_maskrcnn.coco import Coco, GroupedSampler
from timetrial_maskrcnn.loading import read_ahead
from timetrial_maskrcnn.model import MaskRCNN
from timetrial_maskrcnn.regions import offered
from timetrial_maskrcnn.scenes import SIDE, Scenes
from timetrial_maskrcnn.seams import MASKS
from timetrial_maskrcnn.weights import CLOSED_NAMES

if TYPE_CHECKING:
    from timetrial_maskrcnn.config import MaskRCNNConfig

REFERENCE_BATCH, REFERENCE_DECAY = 16, (60_000, 80_000)
"""Of the v1.1 rules' formulas for learning rate and decay."""


class MaskRCNNWorkload:
    """Detection and segmentation. `Batch.data` is described in `timetrial_maskrcnn.batch`."""

    def __init__(self, spec: WorkloadSpec, config: MaskRCNNConfig, ctx: RunContext) -> None:
        self.spec, self.config, self.ctx = spec, config, ctx
        root = Path(ctx.config.data.root).expanduser() if ctx.config.data.root else None
        scenes = config.embedded_data == "scenes" and root is None
        self.targets = [
            Target("box_ap", config.targets["box_ap"], log_name="BBOX"),
            Target("mask_ap", config.targets["mask_ap"], log_name="SEGM"),
        ]
        self.eval_cadence = eval_cadence(config.eval)
        self.capture = Capture()  # shapes depend on what the proposals are; `static_detection` fixes them
        self.max_epochs, self.global_batch_size = config.max_epochs, config.global_batch_size
        self.train: Scenes | Coco
        self.eval: Scenes | Coco
        self.pool: ThreadPoolExecutor | None = None
        if scenes:
            self.train, self.eval = Scenes(config.train_scenes, False), Scenes(config.eval_scenes, True)
            return
        sides = config.min_size, config.max_size
        self.train = Coco(root, "train", config.train_split, *sides, config.flip)
        self.eval = Coco(root, "eval", config.eval_split, *sides, False)
        workers = ctx.config.data.workers
        workers = max(1, (os.cpu_count() or 1) // ctx.ranks_per_node) if workers is None else workers
        self.pool = ThreadPoolExecutor(workers, "timetrial-decode") if workers else None

    # ------------------------------------------------------------------------------------------------------- data

    @property
    def train_samples(self) -> int:
        return len(self.train)

    @property
    def eval_samples(self) -> int:
        return len(self.eval)

    def check_data(self) -> None:
        if isinstance(self.train, Scenes):
            digits.find()
        else:
            assert self.train.root is not None  # or the plugin's `check` has refused the run
            check_manifest(self.train.root, "maskrcnn_mlperf", self.ctx.data_rank, self.ctx.data_size)
            if self.config.backbone == "resnet50" and self.config.pretrained is None:
                raise DataError(
                    f"workload.pretrained is not set: give {weights.LAYOUT}, or `random`, which the rules forbid"
                )
        _ = self._sampler  # a data set smaller than one global batch is an error before the clock, too

    @cached_property
    def _sampler(self) -> EpochSampler:
        sizes: dict[str, int] = {
            "examples": self.train_samples, "global_batch": self.global_batch_size, "rank": self.ctx.data_rank,
            "world_size": self.ctx.data_size,
        }  # fmt: skip
        return (
            EpochSampler(**sizes) if isinstance(self.train, Scenes) else GroupedSampler(**sizes, wide=self.train.wide)
        )

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        def read(index: int) -> Example:
            return self.train.example(index, self.ctx.seed_for("sample", epoch, index))

        shares = self._sampler.epoch(self.ctx.seed_for("shuffle", epoch), first_batch)
        for share, examples in read_ahead(((s, s.indices.tolist()) for s in shares), read, self.pool):
            yield Batch(self._collate(examples, self.train), share.samples, share.weight)

    def _collate(self, examples: list[Example], part: Scenes | Coco) -> dict[str, Tensor]:
        return collate(examples, part.objects, 1 if part.objects else self.config.size_multiple)

    def _eval_batches(self) -> Iterator[dict[str, Tensor]]:
        """Every `world_size`-th batch. Ranks share out whole ones, since a kernel's last bits depend on the batch."""
        size, ctx = self.config.eval.batch_size or self.global_batch_size, self.ctx
        starts = range(ctx.data_rank * size, self.eval_samples, ctx.data_size * size)
        groups = ((None, range(start, min(start + size, self.eval_samples))) for start in starts)
        for _, examples in read_ahead(groups, self.eval.example, self.pool):
            yield self._collate(examples, self.eval)

    def example_batches(self) -> Iterator[Batch]:
        """Scenes are of one size; images of COCO are mostly as wide as `max_size` allows, or as high."""
        if isinstance(self.train, Scenes):
            yield self._noise(SIDE, SIDE)
            return
        short, long = self.config.min_size, self.config.max_size
        yield self._noise(short, long)
        yield self._noise(long, short)

    def _noise(self, height: int, width: int) -> Batch:
        """Noise with one object in the middle of each image."""
        size = self.global_batch_size // self.ctx.data_size
        generator = torch.Generator().manual_seed(self.ctx.seed_for("synthetic", self.ctx.data_rank))
        box = torch.tensor([width // 4, height // 4, 3 * width // 4, 3 * height // 4])
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, box[1] : box[3], box[0] : box[2]] = 1
        examples = [
            Example(
                torch.randn(self.train.channels, height, width, generator=generator), box[None].float(),
                torch.tensor([1]), mask, id=number, original=(height, width), seed=number,
            )
            for number in range(size)
        ]  # fmt: skip
        data = self._collate(examples, self.train)
        return Batch({name: t.to(self.ctx.device) for name, t in data.items()}, size * self.ctx.data_size)

    # ------------------------------------------------------------------------------------------ model and optimizer

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.ctx.seed_for("init"))
            model = MaskRCNN(self.config, self.train.channels, self.train.classes, offered(self.ctx.offer))
        if self.config.pretrained not in (None, "random"):
            weights.load(model.backbone.body, Path(self.config.pretrained).expanduser())
        self.masks = self.ctx.offer(MASKS, evaluation.masks)
        return model

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)]

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(model, self.config.weight_decay)
        return torch.optim.SGD(groups, lr=self.base_learning_rate, momentum=self.config.momentum)

    def learning_rate(self, step: int) -> float:
        """A straight line up, then steps down (the reference's WarmupMultiStepLR)."""
        config = self.config
        warm = min(1.0, step / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
        risen = config.lr_warmup_factor + (1 - config.lr_warmup_factor) * warm
        return self.base_learning_rate * risen * config.lr_decay_factor ** bisect.bisect_right(self.decay_steps, step)

    @property
    def base_learning_rate(self) -> float:
        return self.config.base_learning_rate or 0.02 * max(1, round(self.global_batch_size / REFERENCE_BATCH))

    @property
    def decay_steps(self) -> list[int]:
        if self.config.lr_decay_at is not None:
            return list(self.config.lr_decay_at)
        stretched = (1 + self.config.lr_decay_k / 10) * REFERENCE_BATCH / self.global_batch_size
        return [round(step * stretched) for step in REFERENCE_DECAY]

    # ------------------------------------------------------------------------------------------ loss and evaluation

    def loss(self, model: nn.Module, data: dict[str, Tensor]) -> Outputs:
        return model(data)

    def infer(self, model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return model(data)

    def evaluate(self, infer: Forward) -> dict[str, float]:
        """Box and mask AP over the evaluation set; detections and annotations go to the run folder's `detections/`."""
        categories, mine = [c["id"] for c in self.eval.categories], list[dict[str, Any]]()
        for data in self.ctx.feed(self._eval_batches()):
            mine += evaluation.records(infer(data), data, categories, self.masks)
        found, quality = evaluation.gathered(mine, self.ctx.mesh), dict[str, float]()
        if self.ctx.rank == 0:
            annotations = self.eval.annotations()
            evaluation.write(self.ctx.run_dir / "detections", annotations, found)
            quality = evaluation.average_precision(annotations, found)
        return self.ctx.backend.broadcast(quality)

    # --------------------------------------------------------------------------------------------- log and checkpoint

    def log_values(self) -> Mapping[str, Any]:
        """v1.1 rules, compliance_checker/training_1.1.0/closed_maskrcnn.yaml."""
        config = self.config
        return {
            "opt_base_learning_rate": self.base_learning_rate,
            "opt_learning_rate_warmup_steps": config.lr_warmup_steps,
            "opt_learning_rate_warmup_factor": config.lr_warmup_factor,
            "opt_learning_rate_decay_factor": config.lr_decay_factor,
            "opt_learning_rate_decay_steps": self.decay_steps,
            "num_image_candidates": config.proposals_train,
            "min_image_size": SIDE if isinstance(self.train, Scenes) else config.min_size,
            "max_image_size": SIDE if isinstance(self.train, Scenes) else config.max_size,
        }

    def weight_names(self, model: nn.Module) -> list[str]:
        return list(CLOSED_NAMES) if self.config.backbone == "resnet50" else []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All that training draws is a function of seed, epoch and image."""
