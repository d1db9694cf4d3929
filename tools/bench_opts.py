"""What each opt is worth on a workload: throughput, or time to target, against the baseline side by side.

    uv run python tools/bench_opts.py workload=bert unpad sequence_packing unpad,fused_loss,fused_optimizer
    uv run python tools/bench_opts.py workload=bert unpad --to-target --rounds 3

Words with `=` are overrides for every run; the others are contenders, each one or more opts. Without contenders: each
installed opt that this workload and this machine can run, and all that do not conflict together. Every run is the real
command in a separate process with one torch thread. Rounds are interleaved, and each contender comes first equally
often; ratios are taken within a round and given as median (minimum to maximum). Throughput runs on synthetic data
unless an override says `data=real`; the first fifth of the steps is not timed. A contender that shows no evidence of
having been active is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from itertools import combinations, count
from pathlib import Path
from typing import Any

from core.api.statistics import race, ratios, spread, table
from core.testing.matrix import installed_opts, spec_of

BASELINE = "baseline"


def run(contender: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One run of the real command: its result.json, with its metrics. ValueError, with its words, where it failed."""
    run_dir = Path(tempfile.mkdtemp(dir=folder)) / "run"
    opts = "" if contender == BASELINE else contender
    command = [sys.executable, "-m", "core.run", *overrides, f"opt=[{opts}]", f"run_dir={run_dir}"]
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 4):
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("timetrial: "))
    result = json.loads((run_dir / "result.json").read_text())
    silent = [name for name, found in result["evidence"].items() if not found["active"]]
    if silent:
        raise ValueError(f"no evidence for {', '.join(silent)}: {result['evidence'][silent[0]]['summary']}")
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {**result, "metrics": metrics}


def throughput(outcome: dict[str, Any]) -> float:
    """Samples a second after the first fifth of the steps, by the run's own clock."""
    looks = [look for look in outcome["metrics"] if "losses" in look]
    settled = next(look for look in looks if look["step"] >= looks[-1]["step"] // 5)
    if settled is looks[-1]:
        raise ValueError("too few looks to time: give more stop.steps or a smaller log_seconds")
    return (looks[-1]["samples"] - settled["samples"]) / (looks[-1]["time_s"] - settled["time_s"])


def able(overrides: list[str], folder: Path) -> list[str]:
    """Each installed opt that two steps of this run accept, and all that do not conflict, together."""
    names = list[str]()
    for name in sorted(installed_opts()):
        try:
            run(name, [*overrides, "stop.steps=2"], folder)
            names.append(name)
        except ValueError as error:
            print(f"{name}: left out: {error}", file=sys.stderr, flush=True)
    together = list[str]()
    for name in names:
        specs = {other: spec_of(other) for other in (*together, name)}
        clash = any(b in specs[a].conflicts or a in specs[b].conflicts for a, b in combinations(specs, 2))
        claim = any(specs[a].claims & specs[b].claims for a, b in combinations(specs, 2))
        together += [] if clash or claim else [name]
    return [*names, ",".join(together)] if len(together) > 1 else names


def entrant(contender: str, overrides: list[str], to_target: bool, folder: Path) -> Callable[[], float]:
    """A turn of the contender: samples/s, or seconds to the target, where its k-th turn has seed k."""
    seeds = count(1)

    def turn() -> float:
        if not to_target:
            return throughput(run(contender, overrides, folder))
        seed = next(seeds)
        outcome = run(contender, [*overrides, f"seed={seed}"], folder)
        if outcome["status"] != "success":
            raise ValueError(f"{contender}, seed {seed}: {outcome['status']}, {outcome['quality']}")
        return outcome["time_to_train_s"]

    return turn


def summary(figures: dict[str, list[float]], to_target: bool, per_sample: float) -> str:
    """Markdown: the figure and the speed-up over the baseline."""
    unit = "time to target, s" if to_target else "samples/s" if per_sample == 1 else "tokens/s"
    base, rows = figures[BASELINE], list[list[object]]()
    for contender, values in figures.items():
        scaled = spread([value * per_sample for value in values])
        gains = spread(ratios(base, values) if to_target else ratios(values, base))
        rows.append([contender, scaled.n, f"{scaled:,.1f}", f"{gains:.2f}"])
    return table(["contender", "n", unit, "speed-up"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="OVERRIDE or CONTENDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--to-target", action="store_true", help="train to the target; round k has seed k")
    parser.add_argument("--per-sample", type=float, default=1, help="useful tokens of a sample, to print tokens/s")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    overrides = [word for word in arguments.words if "=" in word]
    contenders = [word for word in arguments.words if "=" not in word]
    if not arguments.to_target:
        chosen = {override.partition("=")[0] for override in overrides}
        overrides += [] if "data" in chosen else ["data=synthetic"]
        overrides += [] if "stop.steps" in chosen else ["stop.steps=50"]
        overrides += [] if "log_seconds" in chosen else ["log_seconds=0.2"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            contenders = [BASELINE, *(contenders or able(overrides, Path(folder)))]
            entrants = {c: entrant(c, overrides, arguments.to_target, Path(folder)) for c in contenders}
            figures = race(entrants, arguments.rounds, title="bench_opts")
    except ValueError as error:
        print(f"bench_opts: {error}", file=sys.stderr)
        return 1
    print(summary(figures, arguments.to_target, arguments.per_sample))
    versions = {"torch": metadata.version("torch"), "python": platform.python_version()}
    print(f"\n{' '.join(overrides)}; {os.cpu_count()} cores, {platform.machine()}, one torch thread; {versions}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"versions": versions, "command": sys.argv, "rounds": figures}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
