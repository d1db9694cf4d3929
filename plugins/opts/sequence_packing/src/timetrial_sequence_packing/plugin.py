"""The opt `sequence_packing`: rows that hold several sequences instead of one and padding."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.types import Evidence, OptSpec, Plugin

if TYPE_CHECKING:
    from timetrial_sequence_packing.encoder import Encoder
    from timetrial_sequence_packing.packing import Counts

ENCODER = "bert.encoder"


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
        interface=1,
        summary="several sequences in one row, attention and positions kept apart",
        numerics="tolerance",
        components=frozenset({ENCODER}),
        conflicts={
            "unpad": "both take out the padding, each in its own layout",
            "grad_accumulation": "it splits a batch along dimension 0, where packed rows are no longer examples",
        },
    )
    Config = SequencePackingConfig
    config: SequencePackingConfig

    _encoder: Encoder | None = None
    _counts: Counts | None = None

    @hookimpl(wrapper=True)
    def component(self, name: str) -> Generator[None, Any, Any]:
        inner = yield
        if name == ENCODER:
            from timetrial_sequence_packing.encoder import Encoder

            self._encoder = Encoder(inner)
            return self._encoder
        return self._feed(inner) if name == "feed" else inner

    def _feed(self, inner: Callable[[Iterable[Any]], Iterator[Any]]) -> Any:
        from timetrial_sequence_packing.packing import Counts, Rounding, packed

        self._counts = counts = Counts()
        config = self.config
        rounding = Rounding(
            rows=config.round_rows_to, length=config.round_length_to, predictions=config.round_predictions_to
        )
        return lambda items: inner(packed(item, rounding, counts) for item in items)

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
