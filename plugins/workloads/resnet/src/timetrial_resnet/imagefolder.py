"""A folder of JPEG files, one folder a class, as torchvision's ImageFolder and ImageNet have it; decoded on the fly.

    ROOT/train/<class>/*.jpg      ROOT/val/<class>/*.jpg      (or .jpeg, .png; capital letters, too)

Classes are numbered in the alphabetical order of their names.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from core.api.data import EpochSampler, eval_share
from core.api.errors import DataError
from core.api.types import Batch, RunContext
from timetrial_resnet.crops import central_crop, random_crop

CHANNELS = 3
CHANNEL_MEANS = (123.68, 116.78, 103.94)
"""Red, green, blue, of 255. The reference (imagenet_preprocessing.py) subtracts them and divides by nothing."""

IMAGENET_CLASSES, IMAGENET_TRAIN, IMAGENET_VAL = 1000, 1281167, 50000
"""What a synthetic run takes the data set to be."""

SUFFIXES = (".jpeg", ".jpg", ".png")
LAYOUT = "data.root must be a folder with train/<class>/*.jpg and val/<class>/*.jpg"

IGNORED = -100
"""Label of an unreadable image: `F.cross_entropy` ignores it by default, and no prediction equals it."""

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for a file that is truncated, is not an image, or is absurdly large."""

AHEAD = 2
"""Batches that are being read while one is being trained on: one to hand over, one to keep the threads busy."""

Key = TypeVar("Key")

# Threads, not DataLoader's processes: Pillow lets go of the interpreter lock while it decodes and resizes. 500 x 375
# JPEGs on two cores: 690 images/s in one thread, 1,280 in four, 1,490 in two processes; and threads start at once on
# the clock, need no shared memory, do not mind a CUDA context, and cannot outlive the run.


class ImageFolder:
    """JPEG files under `root`, decoded and cropped to `size` x `size` pixels.

    Batches are (images [B, 3, size, size] float32, channel means subtracted, labels [B] int64). An unreadable image is
    counted, named once on stderr, and becomes a blank image with the label IGNORED, so that batches keep their shape.
    More than `data.max_bad` of them raise DataError: here on the rank that meets them, and in `ResNetWorkload.evaluate`
    where no rank alone exceeds that number.
    """

    channels = CHANNELS

    def __init__(self, ctx: RunContext, root: Path | None, size: int, classes: int | None, flip: bool) -> None:
        self.ctx, self.root, self.size, self.flip = ctx, root, size, flip
        self.classes = classes or IMAGENET_CLASSES
        self.train_samples, self.eval_samples = IMAGENET_TRAIN, IMAGENET_VAL
        self.bad: dict[int, str] = {}
        """Unreadable images, by example number; those of `val` follow those of `train`."""
        self._given_classes = classes
        self._names: list[str] = []
        self._paths: list[str] = []
        self.labels = np.empty(0, np.int64)
        workers = ctx.config.data.workers
        self.workers = max(1, (os.cpu_count() or 1) // ctx.ranks_per_node) if workers is None else workers
        self.pool: ThreadPoolExecutor | None = None

    def check(self) -> None:
        """Lists the files: class folders, their number, and at least one image in each. Opens none of them."""
        assert self.root is not None  # or the plugin's `check` has refused the run
        for split in ("train", "val"):
            if not (self.root / split).is_dir():
                raise DataError(f"folder {self.root / split} does not exist: {LAYOUT}")
        self._names = _subfolders(self.root / "train")
        if not self._names:
            raise DataError(f"{self.root / 'train'} has no class folders: {LAYOUT}")
        self.classes = self._given_classes or len(self._names)
        if len(self._names) > self.classes:
            raise DataError(f"{self.root / 'train'} has {len(self._names)} classes, workload.classes={self.classes}")
        counts, labels = dict[str, int](), list[int]()
        for split in ("train", "val"):
            paths, of_split = self._list(split)
            self._paths += paths
            labels += of_split
            counts[split] = len(paths)
        self.labels = np.array(labels, np.int64)
        self.train_samples, self.eval_samples = counts["train"], counts["val"]

    def _list(self, split: str) -> tuple[list[str], list[int]]:
        assert self.root is not None
        folder, paths, labels = self.root / split, list[str](), list[int]()
        unknown = sorted(set(_subfolders(folder)) - set(self._names))
        if unknown:
            raise DataError(f"class {unknown[0]} of {folder} is not in {self.root / 'train'}: {LAYOUT}")
        for label, name in enumerate(self._names):
            found = _images(folder / name) if (folder / name).is_dir() else []
            if not found and split == "train":
                raise DataError(f"class folder {folder / name} has no images ({', '.join(SUFFIXES)}): {LAYOUT}")
            paths += found
            labels += [label] * len(found)
        if not paths:
            raise DataError(f"{folder} has no images: {LAYOUT}")
        return paths, labels

    def batches(self, sampler: EpochSampler, epoch: int, first_batch: int) -> Iterator[Batch]:
        """This rank's augmented training batches."""
        seed = self.ctx.seed_for("augment", epoch)
        shares = sampler.epoch(self.ctx.seed_for("shuffle", epoch), first_batch)

        def read(example: int) -> Image.Image:
            rng = np.random.default_rng((seed, example))
            return random_crop(self._paths[example], self.size, self.flip, rng)

        for share, data in self._read_ahead(((share, share.indices) for share in shares), read):
            yield Batch(data, share.samples, share.weight)

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the evaluation set."""
        mine = eval_share(self.eval_samples, self.ctx.data_rank, self.ctx.data_size)
        numbers = np.arange(mine.start, mine.stop) + self.train_samples

        def read(example: int) -> Image.Image:
            return central_crop(self._paths[example], self.size)

        chunks = ((None, numbers[start : start + batch_size]) for start in range(0, len(numbers), batch_size))
        for _, data in self._read_ahead(chunks, read):
            yield data

    def path(self, example: int) -> str:
        """The file of an example; the numbers of `val` follow those of `train`."""
        return self._paths[example]

    def _read_ahead(
        self, jobs: Iterable[tuple[Key, NDArray[np.int64]]], read: Callable[[int], Image.Image]
    ) -> Iterator[tuple[Key, tuple[Tensor, Tensor]]]:
        """Reads the examples of each job, some jobs ahead, and yields them in order, on the device."""
        if self.pool is None and self.workers:
            self.pool = ThreadPoolExecutor(self.workers, "timetrial-decode")
        waiting: deque[tuple[Key, _Reading]] = deque()
        try:
            for key, examples in jobs:
                waiting.append((key, _Reading(self, examples, read)))
                if len(waiting) > AHEAD:
                    key, reading = waiting.popleft()
                    yield key, self._finish(reading)
            while waiting:
                key, reading = waiting.popleft()
                yield key, self._finish(reading)
        finally:  # the reader may stop at any batch
            for _, reading in waiting:
                reading.cancel()

    def _finish(self, reading: _Reading) -> tuple[Tensor, Tensor]:
        pixels, labels, errors = reading.result()
        for example, error in errors.items():
            self._note(example, error)
        device = self.ctx.device
        means = torch.tensor(CHANNEL_MEANS, device=device).view(-1, 1, 1)
        images = torch.sub(pixels.to(device, non_blocking=True), means)  # converts and subtracts in one pass
        return images, labels.to(device, non_blocking=True)

    def _note(self, example: int, error: str) -> None:
        if example in self.bad:
            return
        self.bad[example] = self._paths[example]
        allowed = self.ctx.config.data.max_bad
        print(f"timetrial: unreadable image {self._paths[example]}: {error}", file=sys.stderr, flush=True)
        refuse_too_many(self.bad.values(), allowed)


def refuse_too_many(bad: Iterable[str], allowed: int) -> None:
    """DataError where more images are unreadable than `data.max_bad` allows."""
    names = list(bad)
    if len(names) > allowed:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise DataError(
            f"unreadable image {names[0]}{more}: replace or remove it, or set data.max_bad={len(names)} to skip it"
        )


class _Reading:
    """One batch on its way: every image is written straight into its place, by whichever thread reads it."""

    def __init__(self, images: ImageFolder, examples: NDArray[np.int64], read: Callable[[int], Image.Image]) -> None:
        pin = images.ctx.device.type == "cuda"  # so that the copy to the device need not wait
        shape = (len(examples), CHANNELS, images.size, images.size)
        self._pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        self._labels = torch.from_numpy(images.labels[examples])
        self._examples = [int(e) for e in examples]
        self._read = read
        pool = images.pool
        self._futures = [pool.submit(self._fill, i) for i in range(len(examples))] if pool else None

    def _fill(self, place: int) -> str:
        """Reads one image; returns what is wrong with it, or nothing."""
        row = self._pixels[place].numpy()
        try:
            row[:] = np.asarray(self._read(self._examples[place])).transpose(2, 0, 1)
        except UNREADABLE as error:
            row[:] = np.array(CHANNEL_MEANS, np.uint8).reshape(-1, 1, 1)
            return str(error) or type(error).__name__
        return ""

    def result(self) -> tuple[Tensor, Tensor, dict[int, str]]:
        """pixels [B, 3, size, size] uint8, labels [B] int64, and what is wrong with which example."""
        places = range(len(self._examples))
        found = [f.result() for f in self._futures] if self._futures is not None else [self._fill(i) for i in places]
        errors = {self._examples[i]: error for i, error in enumerate(found) if error}
        self._labels[[i for i, error in enumerate(found) if error]] = IGNORED
        return self._pixels, self._labels, errors

    def cancel(self) -> None:
        for future in self._futures or []:
            future.cancel()


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _images(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries if entry.name.lower().endswith(SUFFIXES))
