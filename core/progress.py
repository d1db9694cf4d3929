"""What a person sees while a run goes on: a rich display on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from core.types import Position, Target

_PLAIN_EVERY_S = 10.0
"""Seconds between plain lines that are not an evaluation: a log file should stay readable."""


class Progress:
    """`update` about once a second, `evaluated` after each evaluation. Writes to stderr; stdout is for the result."""

    def __init__(self, enabled: bool, targets: list[Target], max_epochs: int, epoch_samples: int) -> None:
        self.targets, self.max_epochs, self.epoch_samples = targets, max_epochs, epoch_samples
        self.quality = "not evaluated yet"
        self._enabled, self._last_plain = enabled, 0.0
        self._live: Any = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # No refresh thread: it would take the interpreter from the training loop at times of its own choosing.
            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()

    def update(self, position: Position, seconds: float, values: Mapping[str, float]) -> None:
        if not self._enabled or (self._live is None and time.monotonic() - self._last_plain < _PLAIN_EVERY_S):
            return
        speed = values["samples_per_s"]
        left = max(0, self.max_epochs * self.epoch_samples - position.samples) / speed if speed else 0.0
        line = (
            f"{seconds:8.1f} s  epoch {position.epoch}/{self.max_epochs}  step {position.step}  "
            f"loss {values['loss']:.4f}  {speed:,.0f} samples/s  {self.quality}  at most {left:,.0f} s left"
        )
        if self._live is not None:
            self._live.update(line, refresh=True)
        else:
            self._print(line)

    def evaluated(self, position: Position, seconds: float, quality: Mapping[str, float]) -> None:
        self.quality = ", ".join(f"{t.metric} {quality[t.metric]:.4f} (target {t.value:g})" for t in self.targets)
        if self._enabled:
            self._print(f"{seconds:8.1f} s  epoch {position.epochs_done:<3} {self.quality}")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        self._last_plain = time.monotonic()
        if self._live is not None:
            self._live.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)
