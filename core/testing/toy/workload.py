"""Points around one centre per class, and a two-layer network that learns to tell them apart.

Shapes: points (N, features) float32, labels (N,) int64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.api.data import EpochSampler, eval_cadence, eval_share
from core.api.seams import TENSOR_PLAN
from core.api.types import Batch, Capture, Forward, Outputs, RunContext, Target, WorkloadSpec
from core.testing.toy.config import ToyConfig


class ToyWorkload:
    capture = Capture(step=True)

    def __init__(self, spec: WorkloadSpec, config: ToyConfig, ctx: RunContext) -> None:
        self.spec, self.config, self.ctx = spec, config, ctx
        self.targets = [Target("accuracy", config.targets["accuracy"])]
        self.eval_cadence = eval_cadence(config.eval)
        self.max_epochs = config.max_epochs
        self.global_batch_size = config.global_batch_size
        self.train_samples, self.eval_samples = config.examples, config.eval_examples
        self.sampler = EpochSampler(
            examples=config.examples,
            global_batch=config.global_batch_size,
            rank=ctx.data_rank,
            world_size=ctx.data_size,
        )

    def check_data(self) -> None:
        generator = torch.Generator().manual_seed(self.ctx.seed_for("points"))
        c = self.config
        centres = torch.randn(c.classes, c.features, generator=generator)
        labels = torch.arange(c.examples + c.eval_examples) % c.classes
        points = centres[labels] + 1.5 * torch.randn(len(labels), c.features, generator=generator)
        self.points, self.labels = points.to(self.ctx.device), labels.to(self.ctx.device)

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.ctx.seed_for("init"))
            c = self.config
            self.ctx.offer(TENSOR_PLAN, {"0": "column", "3": "row"} | ({"2": "random"} if c.dropout else {}))
            return nn.Sequential(
                nn.Linear(c.features, c.hidden), nn.ReLU(), nn.Dropout(c.dropout), nn.Linear(c.hidden, c.classes)
            )

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [layer for layer in model.children() if isinstance(layer, nn.Linear)]

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.config.learning_rate, momentum=self.config.momentum)

    def learning_rate(self, step: int) -> float:
        return self.config.learning_rate

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        for share in self.sampler.epoch(self.ctx.seed_for("shuffle", epoch), first_batch):
            rows = torch.from_numpy(share.indices).to(self.ctx.device)
            data = {"points": self.points[rows], "labels": self.labels[rows]}
            yield Batch(data, share.samples, share.weight)

    def example_batches(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.ctx.seed_for("synthetic"))
        local = self.global_batch_size // self.ctx.data_size
        points = torch.randn(local, self.config.features, generator=generator)
        labels = torch.randint(self.config.classes, (local,), generator=generator)
        data = {"points": points.to(self.ctx.device), "labels": labels.to(self.ctx.device)}
        yield Batch(data, self.global_batch_size)

    def loss(self, model: nn.Module, data: dict[str, Tensor]) -> Outputs:
        return {"loss": nn.functional.cross_entropy(model(data["points"]), data["labels"])}

    def infer(self, model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        return model(data["points"])

    def evaluate(self, infer: Forward) -> dict[str, float]:
        mine = eval_share(self.eval_samples, self.ctx.data_rank, self.ctx.data_size)
        first, last = self.train_samples + mine.start, self.train_samples + mine.stop
        size, correct = self.config.eval.batch_size or self.eval_samples, 0.0
        for start in range(first, last, size):
            rows = slice(start, min(start + size, last))
            predicted = infer({"points": self.points[rows]}).argmax(1)
            correct += float((predicted == self.labels[rows]).sum())
        counts = self.ctx.gather([correct, float(len(mine))])
        return {"accuracy": sum(c for c, _ in counts) / sum(n for _, n in counts)}

    def log_values(self) -> Mapping[str, Any]:
        return {}

    def weight_names(self, model: nn.Module) -> list[str]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
