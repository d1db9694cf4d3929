"""A few training steps under torch.profiler, and the trace that it leaves; all other steps run without it."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

_open = False


def span(name: str) -> AbstractContextManager[Any]:
    """A named span in the trace of an open window; outside one nothing, for `record_function` always costs."""
    return record_function(name) if _open else nullcontext()


class Window:
    """`advance` is called between training steps: `before` of them pass, the next `steps` are profiled.

    A window that an evaluation or the end of the run closes early holds fewer.
    """

    def __init__(self, before: int, steps: int) -> None:
        self.before, self._until = before, before + steps
        self.steps = 0
        """Steps that were profiled."""
        self.problem = f"the run ended before step {before + 2}, the first of them"
        """Why there are none, where there are none."""
        self._count = 0
        self._profile: profile | None = None
        self._thread = 0

    def advance(self) -> None:
        """Called before each step, and so after each but the last."""
        self._count += 1
        self.steps += _open
        if self._count == self.before + 1:
            self._start()
        elif self._count > self._until:
            self._stop()

    def close(self) -> None:
        """Ends the window after the step that came last."""
        self.steps += _open
        self._stop()

    def _stop(self) -> None:
        global _open
        if _open and self._profile is not None:
            _open = False
            self._profile.stop()

    def _start(self) -> None:
        global _open
        if torch.autograd._profiler_enabled():
            self.problem = "another profiler was running"
            return
        activities = [ProfilerActivity.CPU]
        if torch.accelerator.is_available():
            activities = list(torch.profiler.supported_activities())
        else:  # torch's profiler reports the lack of a GPU on stderr, as an error: level 4
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        # The feed's thread and those that complete collectives are in the trace, too.
        everywhere = _ExperimentalConfig(profile_all_threads=True)
        self._profile = profile(activities=activities, experimental_config=everywhere, acc_events=True)
        self._profile.start()
        _open, self._thread = True, threading.get_native_id()

    def trace(self, keep: Path | None) -> tuple[list[dict[str, Any]], int]:
        """The trace's events, none where nothing was profiled, and the native id of the thread that ran the steps;
        `keep` is a file to leave the trace in."""
        if self._profile is None:
            return [], 0
        if keep is not None:
            self._profile.export_chrome_trace(str(keep))
            return _events(keep), self._thread
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return _events(path), self._thread


def _events(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["traceEvents"]
