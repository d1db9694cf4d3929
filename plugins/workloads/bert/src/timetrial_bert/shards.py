"""Prepared examples: Arrow files that Hugging Face `datasets` maps into memory. See `timetrial_bert.prepare`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from core.api.errors import DataError
from core.api.preparation import check_manifest
from timetrial_bert import wordpiece
from timetrial_bert.pairs import Example, mask

if TYPE_CHECKING:
    from core.api.types import RunContext
    from timetrial_bert.config import BertConfig

PARTS = ("train", "eval")
VOCABULARY = "vocab.txt"

_NUMBERS = List(Value("uint16"))  # a vocabulary has at most 65,536 tokens
FEATURES = Features(
    {
        "input_ids": _NUMBERS,
        "second_start": Value("uint16"),
        "random_next": Value("bool"),
        "predictions": Value("uint16"),
        "masked_positions": _NUMBERS,
        "masked_labels": _NUMBERS,
    }
)
"""Of one example, see `timetrial_bert.pairs.Example`. Where masking is dynamic the masked lists are empty, `input_ids`
is not masked, and `predictions` says how many tokens are to be."""

MUST_AGREE = ("lower_case", "sequence_length", "max_predictions", "masked_share", "masking")
"""Settings of the preparation that a run may not change."""


def write(path: Path, examples: Iterable[tuple[Example, int]]) -> tuple[int, int, int]:
    """Writes (example, its number of predictions) to one file. Returns how many examples, tokens and predictions."""
    count = tokens = predictions = 0
    with ArrowWriter(path=str(path), features=FEATURES) as writer:
        for example, number in examples:
            writer.write(
                {
                    "input_ids": example.input_ids.astype(np.uint16),
                    "second_start": example.second_start,
                    "random_next": example.random_next,
                    "predictions": number,
                    "masked_positions": example.masked_positions.astype(np.uint16),
                    "masked_labels": example.masked_labels.astype(np.uint16),
                }
            )
            count, tokens, predictions = count + 1, tokens + len(example.input_ids), predictions + number
        writer.finalize()
    return count, tokens, predictions


class Shards:
    """The examples in data.root. Nothing but the rows of a batch is ever read."""

    def __init__(self, config: BertConfig, ctx: RunContext) -> None:
        self.config, self.ctx = config, ctx
        self.train_samples = self.eval_samples = 0

    @cached_property
    def root(self) -> Path:
        given = self.ctx.config.data.root
        assert given  # or the plugin's `check` has refused the run
        return Path(given).expanduser()

    def check(self) -> None:
        """Files and sums, and that they were prepared with this run's settings; takes the counts from the manifest."""
        manifest = check_manifest(self.root, "bert_mlperf", self.ctx.data_rank, self.ctx.data_size)
        prepared = manifest["request"]["settings"]
        for name in MUST_AGREE:
            mine = getattr(self.config, name)
            if prepared.get(name) != mine:
                raise DataError(
                    f"{self.root} was prepared with workload.{name}={prepared.get(name)}, not {mine}: "
                    "change it back, or prepare the data again"
                )
        if (
            self.config.init_checkpoint == "starter"
            and self.vocabulary.tokens != wordpiece.load(wordpiece.STARTER, self.config.lower_case).tokens
        ):
            raise DataError(
                f"{self.root / VOCABULARY} is not the starter checkpoint's vocabulary: "
                "set workload.init_checkpoint=null, or prepare the data with workload.vocab_file=starter"
            )
        if manifest["counts"]["tokens in the vocabulary"] > self.config.vocab_size:
            raise DataError(
                f"{self.root / VOCABULARY} has {manifest['counts']['tokens in the vocabulary']} tokens: "
                "set workload.vocab_size to at least as many"
            )
        self._files = {part: sorted(n for n in manifest["files"] if n.startswith(f"{part}/")) for part in PARTS}
        self.train_samples = manifest["counts"]["training examples"]
        self._all_eval_samples = manifest["counts"]["evaluation examples"]
        self.eval_samples = min(self._all_eval_samples, self.config.max_eval_samples or self._all_eval_samples)

    @cached_property
    def vocabulary(self) -> wordpiece.WordPiece:
        return wordpiece.load(self.root / VOCABULARY, self.config.lower_case)

    def _open(self, part: str) -> Dataset:
        return concatenate_datasets([Dataset.from_file(str(self.root / name)) for name in self._files[part]])

    @cached_property
    def _train(self) -> Dataset:
        return self._open("train").with_format("arrow")

    @cached_property
    def _train_counts(self) -> Dataset:
        return self._train.select_columns(["predictions"])

    @cached_property
    def _eval(self) -> Dataset:
        return self._open("eval").with_format("arrow")

    def prediction_counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of training examples, how many tokens each one predicts."""
        return self._train_counts[indices.tolist()]["predictions"].to_numpy().astype(np.int64)

    def train(self, indices: Iterable[int], epoch: int) -> list[Example]:
        """Training examples by number, with the masks of the epoch."""
        numbers = [int(i) for i in indices]
        rows = _rows(self._train[numbers])
        if self.config.masking == "static":
            return [example for example, _ in rows]
        seed = self.ctx.seed_for("mask", epoch) << 64
        return [
            mask(example.input_ids, example.second_start, example.random_next, count, self.vocabulary, seed | number)
            for number, (example, count) in zip(numbers, rows, strict=True)
        ]

    def evaluation(self, indices: Iterable[int]) -> list[Example]:
        """Evaluation examples; where there are more than are used, evenly spaced ones. Their masks never change."""
        spaced = [i * self._all_eval_samples // self.eval_samples for i in indices]
        return [example for example, _ in _rows(self._eval[spaced])]


def _rows(table: Any) -> Iterator[tuple[Example, int]]:
    """An Arrow table's rows as examples, each with its number of predictions."""
    columns = {name: table.column(name).combine_chunks() for name in FEATURES}
    lists = ("input_ids", "masked_positions", "masked_labels")
    values = {name: columns[name].values.to_numpy().astype(np.int64) for name in lists}
    ends = {name: columns[name].offsets.to_numpy() for name in lists}
    plain = {name: columns[name].to_pylist() for name in ("second_start", "random_next", "predictions")}
    for row in range(table.num_rows):
        ids, positions, labels = (values[name][ends[name][row] : ends[name][row + 1]] for name in lists)
        example = Example(ids, plain["second_start"][row], positions, labels, plain["random_next"][row])
        yield example, plain["predictions"][row]
