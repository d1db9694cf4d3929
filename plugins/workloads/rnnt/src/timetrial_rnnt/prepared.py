"""Speech that `core.prepare` has made ready: see `timetrial_rnnt.prepare`."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.api.errors import DataError
from core.api.preparation import check_manifest
from timetrial_rnnt.prepare import INDEX, MODEL, RATE
from timetrial_rnnt.text import Letters, SentencePieces, Tokens

if TYPE_CHECKING:
    from core.api.types import RunContext
    from timetrial_rnnt.config import RnntConfig

MUST_AGREE = ("tokens", "vocab_size", "max_duration")
"""Settings of the preparation that a run may not change."""


class PreparedSpeech:
    """The utterances in data.root, mapped into memory: nothing but those of a batch is read."""

    def __init__(self, config: RnntConfig, ctx: RunContext) -> None:
        self.config, self.ctx = config, ctx
        self.train_samples = self.eval_samples = 0
        self._sounds: dict[str, NDArray[np.int16]] = {}

    @cached_property
    def root(self) -> Path:
        given = self.ctx.config.data.root
        assert given  # or the plugin's `check` has refused the run
        return Path(given).expanduser()

    @property
    def _option(self) -> str:
        """Of the two, the one whose preparation fits this run."""
        return "rnnt" if self.config.tokens == "letters" else "rnnt_mlperf"

    @property
    def tokens(self) -> Tokens:
        """Known once the data have been checked."""
        return self._tokens

    def check(self) -> None:
        """Files and sums, and that they were prepared with this run's settings; reads the index."""
        manifest = check_manifest(self.root, self._option, self.ctx.data_rank, self.ctx.data_size)
        prepared = manifest["request"]["settings"]
        for name in MUST_AGREE:
            mine = getattr(self.config, name)
            if prepared.get(name) != mine:
                raise DataError(
                    f"{self.root} was prepared with workload.{name}={prepared.get(name)}, not {mine}: "
                    "change it back, or prepare the data again"
                )
        letters = self.config.tokens == "letters"
        self._tokens: Tokens = Letters() if letters else SentencePieces(self.root / MODEL)
        self._rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
        with (self.root / INDEX).open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                self._rows[row["part"]].append(row)
        self.train_samples, self.eval_samples = len(self._rows["train"]), len(self._rows["eval"])

    def durations(self, part: str) -> NDArray[np.float64]:
        return np.array([row["samples"] / RATE for row in self._rows[part]])

    def audio(self, part: str, number: int) -> NDArray[np.float32]:
        row = self._rows[part][number]
        sound = self._sounds.get(row["file"])
        if sound is None:
            sound = self._sounds[row["file"]] = np.memmap(self.root / row["file"], "<i2", "r")
        return sound[row["start"] : row["start"] + row["samples"]].astype(np.float32) / np.float32(32768)

    def transcript(self, part: str, number: int) -> str:
        return self._rows[part][number]["text"]
