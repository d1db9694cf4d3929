"""The opt `unpad`: the tokens of a batch in one row, without padding."""

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
    from timetrial_unpad.batch import Counts
    from timetrial_unpad.encoder import Encoder


@dataclass(kw_only=True)
class UnpadConfig:
    """Settings of `opt.unpad`."""

    round_to: int = checked(at_least=1)
    """Tokens, and masked tokens, are filled up to a multiple of this."""


class Unpad(Plugin):
    """Takes padding out of every batch, of training and evaluation, before it reaches the device."""

    spec = OptSpec(
        interface=2,
        summary="no computation on padding",
        numerics="tolerance",
        replaces=frozenset({ENCODER}),
        conflicts={
            "sequence_packing": "both take out the padding, each in its own layout",
            "grad_accumulation": "it splits a batch along dimension 0, which unpadded tokens share with no example",
        },
    )
    Config = UnpadConfig
    config: UnpadConfig

    _encoder: Encoder | None = None
    _counts: Counts | None = None

    @hookimpl
    def replace(self) -> list[Replacement[Any]]:
        return [ENCODER.by(self._make_encoder)]

    def _make_encoder(self, inner: Any) -> Encoder:
        from timetrial_unpad.encoder import Encoder

        self._encoder = Encoder(inner)
        return self._encoder

    @hookimpl(wrapper=True)
    def transform(self) -> Generator[None, Iterable[Batch], Iterable[Batch]]:
        from timetrial_unpad.batch import Counts, unpad

        batches = yield
        counts = self._counts = self._counts or Counts()
        return (dataclasses.replace(batch, data=unpad(batch.data, self.config.round_to, counts)) for batch in batches)

    @hookimpl
    def verify(self) -> Evidence:
        counts, encoder = self._counts, self._encoder
        if counts is None or encoder is None or not counts.batches or not encoder.unpadded:
            return Evidence(plugin="unpad", active=False, summary="no batch has been computed without its padding yet")
        computed = counts.tokens + counts.filling
        removed = 1 - computed / counts.positions
        return Evidence(
            plugin="unpad",
            active=removed > 0 and not encoder.padded,
            summary=f"{removed:.1%} of {counts.positions} positions removed as padding, and "
            f"{1 - counts.predicted / max(1, counts.predictions):.1%} of {counts.predictions} unused predictions; "
            f"attention by {encoder.kernel}{'; SOME BATCHES WERE COMPUTED WITH PADDING' if encoder.padded else ''}",
            figures={
                "share_removed": removed, **asdict(counts), "attention": encoder.kernel, "padded_too": encoder.padded,
            },
        )  # fmt: skip
