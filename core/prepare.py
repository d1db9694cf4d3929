"""`timetrial prepare`, or `python -m core.prepare workload=NAME source=PATH out=FOLDER`: raw data into the files that a
workload reads. What the work is written against is `core.api.preparation`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from core.api.config import RunConfig, validate
from core.api.errors import DataError, UsageError, exit_status
from core.api.files import read_json, write_json
from core.api.preparation import MANIFEST, NOTES, Preparation, check_manifest
from core.api.types import WorkloadSpec
from core.compose.composition import compose
from core.compose.discovery import discover
from core.compose.manager import plugin_manager
from core.compose.resolve import environment

USAGE = "usage: timetrial prepare workload=NAME source=PATH out=FOLDER [seed=N] [data.workers=N] [workload.KEY=VALUE]"


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
    difference = _difference(manifest.get("request") or read_json(begun) or request, request)
    if difference:
        raise UsageError(f"{out} was started with a different {difference}: choose another folder, or remove it")
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


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs, in words. Of the settings of an older request only those count that the preparation depends on."""
    for key in ("workload", "seed", "source"):
        if old.get(key) != new[key]:
            return key
    was = old.get("settings", {})
    changed = [key for key, value in new["settings"].items() if was.get(key) != json.loads(json.dumps(value))]
    return f"workload.{changed[0]} ({was.get(changed[0])}, now {new['settings'][changed[0]]})" if changed else ""


def main() -> int:
    """The entry point of `python -m core.prepare`. Returns the exit status."""
    return exit_status(_main, stopped="stopped; re-run the same command to continue")


def _main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        return 0
    given = {key: value for key, _, value in (argument.partition("=") for argument in sys.argv[1:])}
    source, out = given.get("source"), given.get("out")
    if not source or not out or "workload" not in given:
        raise UsageError(USAGE)
    registry = discover()
    composed, choices = compose([a for a in sys.argv[1:] if not a.startswith(("source=", "out="))], registry)
    config, chosen = validate(RunConfig, composed, ""), registry.find("workload", str(choices["workload"]))
    manager = plugin_manager([chosen], composed)
    (plugin,) = manager.get_plugins()
    if not manager.hook.prepare.get_hookimpls():
        raise UsageError(f"workload '{chosen.name}' needs no preparation; it reads its data directly")
    os.environ.update({**environment(manager, config), **os.environ})
    started = time.monotonic()
    settings = {key: asdict(plugin.config)[key] for key in sorted(cast(WorkloadSpec, plugin.spec).preparation)}
    request = {"workload": chosen.name, "settings": settings}
    manifest = prepare(manager.hook.prepare, request, Path(source), Path(out).absolute(), config)
    counts, seconds = ", ".join(f"{n:,} {key}" for key, n in manifest["counts"].items()), time.monotonic() - started
    print(f"timetrial: prepared {counts}; {len(manifest['bad'])} bad [{out}, {seconds:.1f} s]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
