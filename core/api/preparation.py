"""What a workload's hook `prepare` is written against: files made in parallel, each once, and a manifest of their sums.

The hook is given a `Preparation` and calls its `map`, which writes the files in parallel. Each that is finished is
noted, so that the same command continues after a kill; the manifest, written last, says that the folder is complete.
The bytes are a function of the source, the settings that the workload's spec names and the seed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from core.api.config import RunConfig
from core.api.errors import DataError, TimetrialError
from core.api.files import read_json, sha256, write_json
from core.api.progress import Progress

__all__ = ["Preparation", "check_manifest"]

MANIFEST, NOTES = "manifest.json", ".notes"


@dataclass
class Preparation:
    """What the hook is given."""

    source: Path
    out: Path
    config: RunConfig
    bad: dict[str, str] = field(default_factory=dict[str, str])  # inputs that cannot be used, each with the reason
    files: dict[str, str] = field(default_factory=dict[str, str])  # name -> SHA-256 of each file of the result

    def refuse(self, name: str, reason: str) -> None:
        """Notes an input that cannot be used. DataError once there are more than `data.max_bad`."""
        self.bad[name] = reason
        print(f"timetrial: {name}: {reason}", file=sys.stderr, flush=True)
        if len(self.bad) > self.config.data.max_bad:
            raise DataError(f"{name}: {reason}; repair it, or set data.max_bad={len(self.bad)} to skip it")

    def map(self, label: str, function: Callable[..., Any], jobs: Iterable[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """For each job `(file name, arguments)`, `function(path, *arguments)` writes the file `path` in some process
        and returns a note (JSON data). Returns the notes in the order of the jobs."""
        workers = self.config.data.workers if self.config.data.workers is not None else os.cpu_count()
        # Not fork: a process with threads, as this one has, must not be copied.
        pool = ProcessPoolExecutor(workers, get_context("forkserver")) if workers else ThreadPoolExecutor(1)
        with pool, closing(Progress()) as progress:
            try:
                writing = {name: pool.submit(_write, self.out, name, function, more) for name, more in jobs}
                for done, future in enumerate(as_completed(writing.values()), 1):
                    future.result()
                    progress.update(f"timetrial: {label}: {done} of {len(writing)}")
            except BrokenProcessPool:
                killed = "a worker process was killed (out of memory?)"
                raise TimetrialError(f"{killed}: re-run the same command to continue, or use data.workers=1") from None
            finally:
                pool.shutdown(cancel_futures=True)
            progress.print(f"timetrial: {label}: {len(writing)} of {len(writing)}")
        self.files |= {name: future.result()["sha256"] for name, future in writing.items()}
        return [future.result()["note"] for future in writing.values()]


def _write(out: Path, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Writes one file and its entry, or finds them written. A file that has its name is complete."""
    path, noted = out / name, out / NOTES / f"{name}.json"
    entry = read_json(noted)
    if not entry:
        path.parent.mkdir(parents=True, exist_ok=True)
        noted.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        note = function(partial, *arguments)
        entry = {"sha256": sha256(partial), "note": note}
        partial.replace(path)
        write_json(noted, entry)
    return entry


def check_manifest(root: Path, workload: str, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """The manifest of a prepared folder, once its files' sums are checked: every `world_size`-th one, from `rank` on.
    DataError, naming the file and how to prepare it, where one is missing or differs."""
    remedy = f"prepare it with `python -m core.prepare workload={workload} source=... out={root}`"
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{root} is not a prepared folder ({type(error).__name__} at {MANIFEST}): {remedy}") from None
    for name, expected in sorted(manifest["files"].items())[rank::world_size]:
        if not (root / name).is_file():
            raise DataError(f"{root / name} is missing: {remedy}")
        if sha256(root / name) != expected:
            raise DataError(f"{root / name} has changed (its SHA-256 differs): {remedy}")
    return manifest
