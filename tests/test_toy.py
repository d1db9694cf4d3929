"""The toy workload passes the suite that every workload passes."""

from pathlib import Path

from core.testing.cli import run_cli
from core.testing.suites import WorkloadSuite


class TestToy(WorkloadSuite):
    name = "toy"


def test_the_batch_size_of_an_evaluation_does_not_change_its_quality(tmp_path: Path) -> None:
    whole, parts = (
        run_cli("workload=toy", "stop.epochs=2", f"workload.eval.batch_size={size}", run_dir=tmp_path / size).expect(4)
        for size in ("null", "7")
    )
    assert whole.result["quality"]["accuracy"] > 0.5
    assert whole.result["quality"] == parts.result["quality"]
