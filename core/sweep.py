"""The jobs of a sweep and the table that it ends with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from core.record import read_result


@dataclass(frozen=True)
class Job:
    overrides: list[str]
    run_dir: Path
    code: int


class Sweep:
    """Collects what each job came to; a job that fails does not stop the others."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def add(self, overrides: list[str], run_dir: Path, code: int) -> None:
        self.jobs.append(Job(overrides, run_dir, code))

    def print_table(self) -> None:
        if not self.jobs:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table("job", "overrides", "status", "time to train", "quality", "samples/s", box=box.SIMPLE)
        for number, job in enumerate(self.jobs):
            result = read_result(job.run_dir)
            seconds, speed = result.get("time_to_train_s"), result.get("samples_per_s")
            quality = ", ".join(f"{k} {v:.4f}" for k, v in (result.get("quality") or {}).items())
            table.add_row(
                str(number), " ".join(job.overrides), str(result.get("status", "failed")),
                f"{seconds:.1f} s" if seconds else "", quality or (result.get("error") or {}).get("message", ""),
                f"{speed:,.0f}" if speed else "",
            )  # fmt: skip
        failed = [str(number) for number, job in enumerate(self.jobs) if job.code]
        console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
        console.print(table)
        verdict = f"not successful: {', '.join(failed)}" if failed else "all successful"
        console.print(f"{len(self.jobs)} jobs, {verdict}")
