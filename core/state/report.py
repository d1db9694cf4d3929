"""What a person sees: a line while something goes on, one line when a run has ended, a table after a sweep."""

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.state.record import read_json


class Progress:
    """A line on stderr (stdout is for the result), renewed in place on a terminal, printed now and then elsewhere."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled, self._printed = enabled, 0.0
        self._live: Any = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # No refresh thread: it would take the interpreter from the training loop at times of its own choosing.
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


def quality_text(quality: Mapping[str, float], targets: Mapping[str, float]) -> str:
    """Each metric that has been evaluated, beside its target."""
    return ", ".join(f"{k} {quality[k]:.4f} (target {v:g})" for k, v in targets.items() if k in quality)


def summary(run_dir: Path) -> str:
    """The one line that a run ends with."""
    result = read_json(run_dir / "result.json")
    status, where = result.get("status"), os.path.relpath(run_dir)
    if result.get("error"):
        return f"{status}: {result['error']['message']} [{where}]"
    quality = quality_text(result["quality"], result["target"])
    doubts = [f"{name}: {e['summary']}" for name, e in result["evidence"].items() if not e["active"]]
    head = {
        "success": f"success, not scored ({'resumed' if result['restarts'] else 'changed'}): {quality}",
        "stopped": f"stopped with a checkpoint; the same command with run_dir={where} resumes",
        "throughput": "throughput on synthetic data",
        "not_converged": f"not converged: {quality or 'never evaluated'}",
    }[str(status)]
    if status == "success" and result["time_to_train_s"] is not None:
        head = f"success: time to train {result['time_to_train_s']:.1f} s, {quality}"
    words = f"; NO EVIDENCE for {'; '.join(doubts)}" if doubts else ""
    return f"{head}; {result['steps']:,} steps, {result['samples_per_s'] or 0:,.0f} samples/s{words} [{where}]"


def print_sweep(jobs: Sequence[tuple[Sequence[str], Path, int]]) -> None:
    """The table that a sweep ends with. A job is its overrides, its run folder and its exit status."""
    rows: list[tuple[str, ...]] = []
    for number, (overrides, run_dir, _) in enumerate(jobs):
        result = read_json(run_dir / "result.json")
        status, seconds, speed = (result.get(k) for k in ("status", "time_to_train_s", "samples_per_s"))
        quality = ", ".join(f"{k} {v:.4f}" for k, v in (result.get("quality") or {}).items())
        problem = (result.get("error") or {}).get("message", "")
        figures = f"{seconds:.1f} s" if seconds else "", quality or problem, f"{speed:,.0f}" if speed else ""
        rows.append((str(number), " ".join(overrides), status or "failed", *figures))
    print_table(("job", "overrides", "status", "time to train", "quality", "samples/s"), rows, 160)
    failed = [str(number) for number, (_, _, code) in enumerate(jobs) if code]
    print(f"{len(jobs)} jobs, {'not successful: ' + ', '.join(failed) if failed else 'all successful'}")


def print_table(headings: Iterable[str], rows: Iterable[Iterable[str]], width: int) -> None:
    """A table on stdout, `width` characters wide where that is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width).print(table)
