"""The opt `unpad`: the tokens of a batch in one row, without padding."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from core.api.config import checked
from core.api.hooks import hookimpl
from core.api.types import Evidence, OptSpec, Plugin

if TYPE_CHECKING:
    from timetrial_unpad.batch import Counts
    from timetrial_unpad.encoder import Encoder

ENCODER = "bert.encoder"


@dataclass(kw_only=True)
class UnpadConfig:
    """Settings of `opt.unpad`."""

    round_to: int = checked(at_least=1)
    """Tokens, and masked tokens, are filled up to a multiple of this."""


class Unpad(Plugin):
    """Takes padding out of every batch, of training and evaluation, before it reaches the device."""

    spec = OptSpec(
        interface=1,
        summary="no computation on padding",
        numerics="tolerance",
        components=frozenset({ENCODER}),
        conflicts={
            "sequence_packing": "both take out the padding, each in its own layout",
            "grad_accumulation": "it splits a batch along dimension 0, which unpadded tokens share with no example",
        },
    )
    Config = UnpadConfig
    config: UnpadConfig

    _encoder: Encoder | None = None

    def __init__(self, config: UnpadConfig) -> None:
        super().__init__(config)
        self._counts: Counts | None = None

    @hookimpl(wrapper=True)
    def component(self, name: str) -> Generator[None, Any, Any]:
        inner = yield
        if name == ENCODER:
            from timetrial_unpad.encoder import Encoder

            self._encoder = Encoder(inner)
            return self._encoder
        return self._feed(inner) if name == "feed" else inner

    def _feed(self, inner: Callable[[Iterable[Any]], Iterator[Any]]) -> Any:
        from timetrial_unpad.batch import Counts, unpadded

        self._counts = counts = Counts()
        return lambda items: inner(unpadded(item, self.config.round_to, counts) for item in items)

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
