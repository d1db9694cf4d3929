"""The opt `sequence_packing`: rows that hold several sequences instead of one and padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.seams import Replacement
from core.api.types import Batch, Evidence, OptSpec, Plugin
from timetrial_bert.seams import ENCODER

if TYPE_CHECKING:
    from timetrial_sequence_packing.encoder import Encoder
    from timetrial_sequence_packing.packing import Counts


@dataclass(kw_only=True)
class SequencePackingConfig:
    """Settings of `opt.sequence_packing`."""

    round_rows_to: int = checked(at_least=1)
    """The number of rows is filled up to a multiple of this."""
    round_length_to: int = checked(at_least=1)
    """Rows are as short as this many of them can be, in multiples of this; never longer than the padded rows."""
    round_predictions_to: int = checked(at_least=1)
    """Predictions are filled up to a multiple of this."""


class SequencePacking(Plugin):
    """Packs the sequences of every batch, of training and evaluation, into as few rows as it can."""

    spec = OptSpec(
        interface=2,
        summary="several sequences in one row, attention and positions kept apart",
        numerics="tolerance",
        replaces=frozenset({ENCODER}),
        conflicts={
            "unpad": "both take out the padding, each in its own layout",
            "grad_accumulation": "it splits a batch along dimension 0, where packed rows are no longer examples",
        },
    )
    Config = SequencePackingConfig
    config: SequencePackingConfig

    _encoder: Encoder | None = None
    _counts: Counts | None = None

    @hookimpl
    def replace(self) -> list[Replacement[Any]]:
        return [ENCODER.by(self._make_encoder)]

    def _make_encoder(self, inner: Any) -> Encoder:
        from timetrial_sequence_packing.encoder import Encoder

        self._encoder = Encoder(inner)
        return self._encoder

    @hookimpl(wrapper=True)
    def transform(self) -> Generator[None, Iterable[Batch], Iterable[Batch]]:
        from timetrial_sequence_packing.packing import Counts, Rounding, pack

        batches = yield
        config, counts = self.config, self._counts or Counts()
        self._counts = counts
        rounding = Rounding(
            rows=config.round_rows_to, length=config.round_length_to, predictions=config.round_predictions_to
        )
        return (dataclasses.replace(batch, data=pack(batch.data, rounding, counts)) for batch in batches)

    @hookimpl
    def verify(self) -> Evidence:
        counts, encoder = self._counts, self._encoder
        if counts is None or encoder is None or not counts.batches or not encoder.packed:
            return Evidence(plugin="sequence_packing", active=False, summary="no packed batch has been computed yet")
        efficiency, before = counts.tokens / counts.positions, counts.tokens / counts.padded_positions
        return Evidence(
            plugin="sequence_packing",
            active=counts.rows < counts.sequences and not encoder.padded,
            summary=f"{counts.sequences} sequences in {counts.rows} rows; packing efficiency (tokens per position) "
            f"{efficiency:.1%}, one sequence a row: {before:.1%}"
            f"{'; SOME BATCHES WERE COMPUTED UNPACKED' if encoder.padded else ''}",
            figures={
                "efficiency": efficiency, "efficiency_unpacked": before, **asdict(counts),
                "unpacked_too": encoder.padded,
            },
        )  # fmt: skip
