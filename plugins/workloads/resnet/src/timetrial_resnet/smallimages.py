"""Data sets that fit into memory: digits and IDX files, held on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.api.data import EpochSampler, eval_share
from core.api.errors import DataError
from core.api.types import Batch, RunContext
from timetrial_resnet import digits, idx
from timetrial_resnet.augment import Augmentation

CLASSES = 10
CHANNELS = 1


class SmallImages:
    """Grey images of `size` x `size` pixels.

    Batches are (images [B, 1, size, size] float32 with mean 0 and deviation 1 over the training set, labels [B] int64).
    `root` names a folder of IDX files; None means the embedded digits.
    """

    channels = CHANNELS
    bad: dict[int, str]
    """None of these files has a part that could be unreadable by itself."""

    def __init__(
        self, ctx: RunContext, root: Path | None, size: int, classes: int | None, augmentation: Augmentation
    ) -> None:
        self.ctx, self.root, self.size, self.augmentation = ctx, root, size, augmentation
        self.classes = classes or CLASSES
        held_out = digits.EXAMPLES // digits.EVERY
        self.train_samples, self.eval_samples = digits.EXAMPLES - held_out, held_out
        self.bad = {}
        self._loaded: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self) -> None:
        """Finds the files, checks them without reading an example, and takes the counts from their headers."""
        if self.root is None:
            digits.check(digits.find())
            return
        counts: dict[str, int] = {}
        for split in ("train", "val"):
            images, labels = (idx.find(self.root, split, kind) for kind in ("images", "labels"))
            shape, count = idx.shape(images), idx.shape(labels)
            if len(shape) != 3 or shape[1] != shape[2] or count != shape[:1]:
                raise DataError(
                    f"{images} has shape {shape} and {labels.name} {count}: square images with as many labels"
                )
            counts[split], self.size = shape[0], shape[1]
        self.train_samples, self.eval_samples = counts["train"], counts["val"]

    def batches(self, sampler: EpochSampler, epoch: int, first_batch: int) -> Iterator[Batch]:
        """This rank's augmented training batches."""
        images, labels = self._load("train")
        maps = self.augmentation.draw(len(images), self.size, self.ctx.seed_for("augment", epoch)).to(images.device)
        for share in sampler.epoch(self.ctx.seed_for("shuffle", epoch), first_batch):
            chosen = torch.from_numpy(share.indices).to(images.device)
            augmented = self.augmentation.apply(images[chosen], maps[chosen])
            yield Batch((self._normalise(augmented), labels[chosen]), share.samples, share.weight)

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the evaluation set."""
        images, labels = self._load("val")
        mine = eval_share(self.eval_samples, self.ctx.data_rank, self.ctx.data_size)
        for start in range(mine.start, mine.stop, batch_size):
            part = slice(start, min(start + batch_size, mine.stop))
            yield self._normalise(images[part]), labels[part]

    def _normalise(self, images: Tensor) -> Tensor:
        return (images - self._mean) / self._deviation

    def _load(self, split: str) -> tuple[Tensor, Tensor]:
        """All images [N, 1, size, size], from 0 to 1, and labels [N] of a split; read once, on the clock."""
        if split not in self._loaded:
            pixels, labels = self._read(split)
            if labels.max() >= self.classes:
                raise DataError(f"{self.root} has labels up to {labels.max()}: set workload.classes={labels.max() + 1}")
            images = torch.from_numpy(pixels).to(self.ctx.device).unsqueeze(1).float() / 255
            self._loaded[split] = images, torch.from_numpy(labels.astype(np.int64)).to(self.ctx.device)
            if split == "train":
                self._mean, self._deviation = images.mean(), images.std()
        if "train" not in self._loaded:
            self._load("train")  # its mean and deviation normalise the evaluation set, too
        return self._loaded[split]

    def _read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        if self.root is None:
            return digits.read(digits.find(), split)
        return tuple(idx.read(idx.find(self.root, split, kind)) for kind in ("images", "labels"))  # pyright: ignore
