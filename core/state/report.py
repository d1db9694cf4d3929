"""What a person reads when a run has ended, and after a sweep. Made from run folders alone."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.api.files import read_json
from core.api.tables import print_table


def quality_text(quality: Mapping[str, float], targets: Mapping[str, float]) -> str:
    """Each metric that has been evaluated, beside its target."""
    return ", ".join(f"{k} {quality[k]:.4f} (target {v:g})" for k, v in targets.items() if k in quality)


def summary(run_dir: Path) -> str:
    """The one line that a run ends with."""
    result = read_json(run_dir / "result.json")
    status, where = result.get("status"), os.path.relpath(run_dir)
    if result.get("error"):
        return f"{status}: {result['error']['message']} [{where}]"
    quality = quality_text(result["quality"], {name: target["value"] for name, target in result["targets"].items()})
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
