"""A progress line on stderr. Imports without torch."""

import sys
import time
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A line on stderr (stdout is for the result), renewed in place on a terminal, printed now and then elsewhere."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled, self._printed = enabled, 0.0
        self._live: Any = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # No refresh thread: it would interrupt the training loop at arbitrary times.
            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()

    def update(self, line: str) -> None:
        if self._live is not None:
            self._live.update(line, refresh=True)
        elif time.monotonic() - self._printed >= 10.0:  # seconds: a log file should stay readable
            self.print(line)

    def print(self, line: str) -> None:
        """A line that stays."""
        self._printed = time.monotonic()
        if self._live is not None:
            self._live.console.print(line, highlight=False)
        elif self._enabled:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
