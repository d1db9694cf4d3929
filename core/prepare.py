"""`python -m core.prepare workload=NAME source=PATH out=FOLDER`: raw data into the files that a workload reads.

A workload's hook `prepare` is given a `Preparation` and calls its `map`, which writes the files in parallel. Each that
is finished is noted, so that the same command continues after a kill, and a manifest of SHA-256 sums, written last,
says that the folder is complete. The bytes are a function of source, settings and seed alone.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from core.api.config import RunConfig, validate
from core.api.errors import DataError, TimetrialError, UsageError, exit_status
from core.compose.discovery import discover
from core.compose.resolve import environment, plugin_manager
from core.run import compose
from core.state.record import read_json, sha256, write_json
from core.state.report import Progress

MANIFEST, NOTES = "manifest.json", ".notes"
USAGE = "usage: python -m core.prepare workload=NAME source=PATH out=FOLDER [seed=N] [data.workers=N] [workload.KEY=V]"


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
            raise DataError(f"{name}: {reason}; repair it, or set data.max_bad={len(self.bad)} to pass over it")

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
                killed = "a worker process was killed, perhaps for want of memory"
                raise TimetrialError(f"{killed}: the same command continues; data.workers=1 needs least") from None
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
        raise DataError(f"{root} is no prepared folder ({type(error).__name__} at {MANIFEST}): {remedy}") from None
    for name, expected in sorted(manifest["files"].items())[rank::world_size]:
        if not (root / name).is_file():
            raise DataError(f"{root / name} is missing: {remedy}")
        if sha256(root / name) != expected:
            raise DataError(f"{root / name} has changed (its SHA-256 differs): {remedy}")
    return manifest


def prepare(hook: Any, request: dict[str, Any], source: Path, out: Path, config: RunConfig) -> dict[str, Any]:
    """Calls the workload's hook, or verifies what it has made before. Returns the manifest."""
    if not source.exists():
        raise DataError(f"source={source} does not exist: name a file or a folder")
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    sizes = [(str(p.relative_to(source)), p.stat().st_size) for p in files]  # tell two sources apart without reading
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    listing = {"files": len(sizes), "bytes": sum(size for _, size in sizes), "listing_sha256": digest}
    request |= {"seed": config.seed, "source": listing}
    begun = out / NOTES / "request.json"
    manifest = check_manifest(out, request["workload"]) if (out / MANIFEST).exists() else {}
    if (manifest.get("request") or read_json(begun) or request) != request:
        raise UsageError(f"{out} was begun from another source or with other settings: choose another, or remove it")
    if manifest:
        return manifest
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_json(begun, request)
    preparation = Preparation(source, out, config)
    counts = hook(preparation=preparation)
    manifest = {"request": request, "counts": counts, "bad": preparation.bad, "files": preparation.files}
    write_json(out / MANIFEST, manifest)
    shutil.rmtree(begun.parent)
    return manifest


def main() -> int:
    """The command. Returns the exit status."""
    given = {key: value for key, _, value in (argument.partition("=") for argument in sys.argv[1:])}
    source, out = given.get("source"), given.get("out")
    if not source or not out or "workload" not in given or "--help" in given:
        raise UsageError(USAGE)
    registry = discover()
    composed, choices = compose([a for a in sys.argv[1:] if not a.startswith(("source=", "out="))], registry)
    config, chosen = validate(RunConfig, composed, ""), registry.find("workload", str(choices["workload"]))
    manager = plugin_manager([chosen], composed)
    (plugin,) = manager.get_plugins()
    if not manager.hook.prepare.get_hookimpls():
        raise UsageError(f"workload '{chosen.name}' has nothing to prepare: it reads its data as it is")
    os.environ.update({**environment(manager, config), **os.environ})
    started = time.monotonic()
    request = {"workload": chosen.name, "settings": asdict(plugin.config)}
    manifest = prepare(manager.hook.prepare, request, Path(source), Path(out).absolute(), config)
    counts, seconds = ", ".join(f"{n:,} {key}" for key, n in manifest["counts"].items()), time.monotonic() - started
    print(f"timetrial: prepared {counts}; {len(manifest['bad'])} bad [{out}, {seconds:.1f} s]")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, stopped="stopped; the same command continues"))
