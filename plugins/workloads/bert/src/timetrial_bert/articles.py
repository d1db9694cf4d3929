"""The embedded articles as training and evaluation examples, made when they are first asked for, in memory."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.api.errors import DataError
from core.api.types import RunContext
from timetrial_bert import embedded, wordpiece
from timetrial_bert.batch import Example
from timetrial_bert.pairs import Pair, mask, pairs, prediction_count
from timetrial_bert.text import Document, documents

if TYPE_CHECKING:
    from timetrial_bert.config import BertConfig

SEED = 12345
"""Of sentence pairs, static masks and evaluation masks, for every run: the reference's (README.md, "Generate the
TFRecords"), which makes evaluations comparable."""


def split(found: Sequence[Document]) -> dict[str, list[Document]]:
    """The articles to train on ("train") and those that are held out ("eval")."""
    held_out = embedded.EVERY - 1
    return {
        "train": [document for number, document in enumerate(found) if number % embedded.EVERY != held_out],
        "eval": list(found[held_out :: embedded.EVERY]),
    }


class Articles:
    """Sentence pairs from the articles that are not held out; evaluation pairs from those that are.

    Masks are drawn anew in every epoch (`masking=dynamic`), or once and for all. Those of evaluation are fixed.
    """

    def __init__(self, config: BertConfig, ctx: RunContext) -> None:
        self.config, self.ctx = config, ctx

    def check(self) -> None:
        path = embedded.find()
        if hashlib.sha256(path.read_bytes()).hexdigest() != embedded.SHA256:
            raise DataError(
                f"{path} has a wrong SHA-256 checksum (expected {embedded.SHA256}): "
                "run `pip install --force-reinstall gensim`"
            )

    @cached_property
    def vocabulary(self) -> wordpiece.WordPiece:
        return wordpiece.load(wordpiece.STARTER, self.config.lower_case)

    @cached_property
    def _pairs(self) -> dict[str, list[Pair]]:
        parts = split(list(documents(embedded.find())))
        made: dict[str, list[Pair]] = {}
        for name, part in parts.items():
            tokenised = [self.vocabulary.encode(document) for document in part]
            rng = random.Random(SEED)
            made[name] = list(
                pairs(tokenised, self.config.sequence_length, self.config.short_probability, self.vocabulary, rng)
            )
        return made

    @property
    def train_samples(self) -> int:
        return len(self._pairs["train"])

    @property
    def eval_samples(self) -> int:
        return len(self._pairs["eval"])

    @cached_property
    def _train_counts(self) -> NDArray[np.int64]:
        return self._counts("train")

    def _counts(self, part: str) -> NDArray[np.int64]:
        lengths = np.array([len(pair.tokens) for pair in self._pairs[part]])
        return prediction_count(lengths, self.config.masked_share, self.config.max_predictions)

    def prediction_counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._train_counts[indices]

    def train(self, indices: Iterable[int], epoch: int) -> list[Example]:
        seeds = (self.ctx.seed_for("mask", epoch),) if self.config.masking == "dynamic" else (SEED,)
        return [self._masked("train", int(i), self._train_counts, seeds[0]) for i in indices]

    def evaluation(self, indices: Iterable[int]) -> list[Example]:
        counts = self._counts("eval")
        return [self._masked("eval", i, counts, SEED) for i in indices]

    def _masked(self, part: str, number: int, counts: NDArray[np.int64], seed: int) -> Example:
        pair = self._pairs[part][number]
        tokens = np.array(pair.tokens)
        return mask(
            tokens, pair.second_start, pair.random_next, int(counts[number]), self.vocabulary, (seed << 64) | number
        )
