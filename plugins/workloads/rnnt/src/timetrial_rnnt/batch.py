"""The layout of a batch, and how utterances become one.

`Batch.data` is a dictionary of tensors. B is the utterances of this rank, T spliced frames (30 ms each), F features of
one, U labels.

    features         [B, T, F] float32   0 behind an utterance's end; T is a multiple of `workload.pad_frames_to`
    feature_lengths  [B]       int64     spliced frames
    labels           [B, U]    int64     0 behind an utterance's last
    label_lengths    [B]       int64

Evaluation has the first two alone.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timetrial_rnnt import features
from timetrial_rnnt.text import Tokens

if TYPE_CHECKING:
    from core.api.types import RunContext
    from timetrial_rnnt.config import RnntConfig

AHEAD = 2
"""Batches that are read while another one is trained on."""


class Corpus(Protocol):
    """Recorded speech. `part` is "train" or "eval"; utterances are numbered, those of each part from 0."""

    train_samples: int
    eval_samples: int

    @property
    def tokens(self) -> Tokens: ...

    def check(self) -> None:
        """Before the clock: files and sums. DataError."""

    def durations(self, part: str) -> NDArray[np.float64]:
        """Of all utterances, in seconds."""
        ...

    def audio(self, part: str, number: int) -> NDArray[np.float32]:
        """16 kHz, between -1 and 1."""
        ...

    def transcript(self, part: str, number: int) -> str: ...


@dataclass(frozen=True)
class Utterance:
    """One utterance on its way into a batch: `sound` is its audio [S], or its features [M, T] where the reader's
    threads compute them."""

    sound: Tensor
    samples: int
    masks: NDArray[np.int64] | None
    labels: list[int]


class Reader:
    """Reads, augments and collates utterances, some batches ahead where there are threads."""

    def __init__(self, config: RnntConfig, ctx: RunContext, corpus: Corpus) -> None:
        self.config, self.ctx, self.corpus = config, ctx, corpus
        self._masks = features.Masks(
            frequency_count=config.freq_masks,
            frequency_max=config.freq_mask_max,
            time_count=config.time_masks,
            time_max=config.time_mask_max,
        )
        workers = ctx.config.data.workers
        workers = max(0, (os.cpu_count() or 1) // ctx.ranks_per_node - 1) if workers is None else workers
        self._pool = ThreadPoolExecutor(workers, "timetrial-speech") if workers else None

    def train(self, jobs: Iterable[NDArray[np.int64]], seed: int) -> Iterator[dict[str, Tensor]]:
        """Augmented training batches, each of the utterances that one array names; `seed` is the epoch's."""
        for utterances in self._read("train", jobs, seed, augment=True):
            yield self._features(utterances) | self._labels(utterances)

    def evaluation(self, jobs: Iterable[NDArray[np.int64]], seed: int) -> Iterator[dict[str, Tensor]]:
        """Evaluation batches."""
        for utterances in self._read("eval", jobs, seed, augment=False):
            yield self._features(utterances)

    def _read(
        self, part: str, jobs: Iterable[NDArray[np.int64]], seed: int, augment: bool
    ) -> Iterator[list[Utterance]]:
        if self._pool is None:
            for numbers in jobs:
                yield [self._utterance(part, int(number), seed, augment) for number in numbers]
            return
        waiting: deque[list[Future[Utterance]]] = deque()
        try:
            for numbers in jobs:
                waiting.append([self._pool.submit(self._utterance, part, int(n), seed, augment) for n in numbers])
                if len(waiting) > AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:  # the reader may stop at any batch
            for future in (future for batch in waiting for future in batch):
                future.cancel()

    def _utterance(self, part: str, number: int, seed: int, augment: bool) -> Utterance:
        """What is random of an utterance depends on `seed` and its number alone."""
        config, rng = self.config, np.random.default_rng((seed, number))
        audio = self.corpus.audio(part, number)
        if augment:
            percent = int(rng.integers(round(100 * config.speed_min), round(100 * config.speed_max) + 1))
            audio = features.change_speed(audio, percent)
        if config.trim_silence_db is not None:
            audio = features.trim(audio, config.trim_silence_db)
        sound = torch.from_numpy(features.dithered(audio, rng))
        masks = self._masks.draw(rng, features.frame_count(len(audio)), config.mels) if augment else None
        if config.features_by == "threads":
            sound = features.log_mel(sound[None], torch.tensor([len(audio)]), config.mels)[0][0]
        return Utterance(sound, len(audio), masks, self.corpus.tokens.encode(self.corpus.transcript(part, number)))

    def _features(self, utterances: list[Utterance]) -> dict[str, Tensor]:
        """One padded batch, on the device where its features are computed there."""
        config, device = self.config, self.ctx.device
        samples = torch.tensor([u.samples for u in utterances])
        if config.features_by == "threads":
            log_mels = torch.zeros(len(utterances), config.mels, max(u.sound.shape[1] for u in utterances))
            for row, utterance in zip(log_mels, utterances, strict=True):
                row[:, : utterance.sound.shape[1]] = utterance.sound
            frames = -(-samples // features.STRIDE)
        else:
            audio = torch.nn.utils.rnn.pad_sequence([u.sound for u in utterances], batch_first=True)
            log_mels, frames = features.log_mel(audio.to(device), samples.to(device), config.mels)
        if utterances[0].masks is not None:
            masks = torch.from_numpy(np.stack([u.masks for u in utterances if u.masks is not None]))
            log_mels = features.mask(log_mels, masks.to(log_mels.device), config.freq_masks)
        spliced, lengths = features.splice(log_mels, frames, config.splice_frames, config.pad_frames_to)
        return {"features": spliced, "feature_lengths": lengths}

    def _labels(self, utterances: list[Utterance]) -> dict[str, Tensor]:
        labels = torch.zeros(len(utterances), max(len(u.labels) for u in utterances), dtype=torch.int64)
        for row, utterance in zip(labels, utterances, strict=True):
            row[: len(utterance.labels)] = torch.tensor(utterance.labels)
        return {"labels": labels, "label_lengths": torch.tensor([len(u.labels) for u in utterances])}
