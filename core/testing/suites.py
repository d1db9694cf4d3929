"""Test classes to inherit: one for each kind of plugin. Each test runs the real command line on the CPU.

A subclass sets `name`; `card_headings` and the sizes below can be overridden. Needs pytest.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar, cast

import pytest
import torch
from omegaconf import OmegaConf

from core.api.config import validate
from core.api.errors import UsageError
from core.api.types import BackendSpec, Kind, OptSpec
from core.compose.discovery import Installed, discover
from core.testing.cli import Outcome, run_cli, run_ranks
from core.testing.imports import brought_along

OPT_CARD = (
    "What it does", "Use it", "Settings", "What it changes numerically", "Expected effect", "When it hurts",
    "Evidence", "Source",
)  # fmt: skip
BACKEND_CARD = ("What it does", "Use it", "Settings", "Evidence", "Source")
TRACKER_CARD = ("What it does", "Use it", "Settings", "Source")
WORKLOAD_CARD = (
    "What it is",
    "Run it",
    "Data",
    "Targets and what they mean",
    "Measured",
    "Closed configuration",
    "Sources",
)


@functools.cache
def cached_run(*overrides: str, fault: str = "", **env: str) -> Outcome:
    """One run for all the tests of a session that need the same one; its folder lives as long as the session."""
    folder = tempfile.mkdtemp(prefix="timetrial-conformance-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return run_ranks(*overrides, run_dir=Path(folder) / "run", fault=fault, **env)


def float64_run(*overrides: str) -> Outcome:
    """As `cached_run`, with the opt `float64` of `core/testing/site` after the others."""
    chosen = [o.removeprefix("+opt=").strip("[]") for o in overrides if o.startswith("+opt=")]
    rest = [o for o in overrides if not o.startswith("+opt=")]
    site = str(Path(__file__).with_name("site"))
    return cached_run(*rest, f"+opt=[{','.join([*chosen, 'float64'])}]", PYTHONPATH=site)


@functools.cache
def _imported_by_discovery() -> frozenset[str]:
    """Modules that a fresh interpreter has imported once every installed plugin is found."""
    code = "import sys; from core.compose.discovery import discover; discover(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    return frozenset(done.stdout.split())


def assert_close(first: Outcome, second: Outcome, rtol: float, atol: float) -> None:
    """The same losses, step by step, and the same parameters, within tolerance."""
    torch.testing.assert_close(torch.tensor(first.losses), torch.tensor(second.losses), rtol=rtol, atol=atol)
    torch.testing.assert_close(first.parameters, second.parameters, rtol=rtol, atol=atol)


class PluginSuite:
    """What holds for every plugin: found without import, imported without torch, configured by its YAML alone."""

    kind: ClassVar[Kind]
    name: ClassVar[str]
    card_headings: ClassVar[tuple[str, ...]]

    @property
    def installed(self) -> Installed:
        return discover().find(self.kind, self.name)

    def test_is_discovered_from_metadata_without_being_imported(self) -> None:
        package = self.installed.target.partition(":")[0].rpartition(".")[0]
        assert package not in _imported_by_discovery()

    def test_is_imported_without_torch(self) -> None:
        modules = tuple(sorted({plugin.target.partition(":")[0] for plugin in discover().plugins}))
        assert brought_along(modules)[self.installed.target.partition(":")[0]] == []

    def test_its_yaml_has_exactly_the_keys_of_its_config(self) -> None:
        config = self.installed.load().Config
        assert set(self._yaml()) == {field.name for field in dataclasses.fields(config)}

    def test_its_config_composes_and_refuses_a_misspelt_key(self) -> None:
        config, values = self.installed.load().Config, self._yaml()
        validate(config, OmegaConf.create(values), "here")
        with pytest.raises(UsageError, match="no_such_key"):
            validate(config, OmegaConf.create({**values, "no_such_key": 1}), "here")

    def test_its_card_has_the_headings(self) -> None:
        folder = self.installed.package_dir
        card = next(path for place in (folder, *folder.parents) if (path := place / "README.md").exists()).read_text()
        assert [h for h in self.card_headings if f"\n## {h}\n" not in card] == []

    def _yaml(self) -> dict[str, object]:
        path = self.installed.conf_file
        nested = self.kind in ("opt", "tracker")
        assert not nested or path.read_text().startswith(f"# @package {self.kind}.{self.name}\n")
        return cast(dict[str, object], OmegaConf.to_container(OmegaConf.load(path)) or {})


class _RunSuite(PluginSuite):
    """Runs of a few steps with the plugin: `arguments` choose it."""

    steps: ClassVar[int] = 12
    rtol: ClassVar[float] = 1e-3
    atol: ClassVar[float] = 1e-4
    float64: ClassVar[bool] = False
    """Whether numbers are compared in float64: where the last bit decides which move or region is chosen."""
    compared: ClassVar[tuple[str, ...]] = ()
    """More overrides for runs whose numbers are compared, so that rounding decides nothing in them."""

    @property
    def arguments(self) -> tuple[str, ...]:
        raise NotImplementedError

    def run(self, *more: str) -> Outcome:
        return cached_run(*self.arguments, f"stop.steps={self.steps}", *more).expect(4)

    def compare(self, *arguments: str) -> Outcome:
        """A run whose numbers are compared with another's."""
        run = float64_run if self.float64 else cached_run
        return run(*arguments, f"stop.steps={self.steps}", *self.compared).expect(4)

    def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(self, tmp_path: Path) -> None:
        middle = self.steps // 2
        arguments = (*self.arguments, f"stop.steps={self.steps}", f"checkpoint.every_steps={middle - 1}")
        killed = run_ranks(*arguments, run_dir=tmp_path / "run", fault=f"step@{middle}=kill")
        assert killed.code != 0
        resumed = run_ranks(*arguments, run_dir=tmp_path / "run").expect(4)
        assert resumed.result["restarts"] == 1
        assert resumed.result["parameters_sha256"] == self.run().result["parameters_sha256"]
        assert resumed.losses == self.run().losses

    @pytest.mark.numbers
    @pytest.mark.distributed
    def test_two_ranks_give_the_result_of_one(self) -> None:
        both = self.compare(*self.arguments, "launch.nproc=2", "backend=gloo")
        assert both.result["world_size"] == 2
        assert_close(both, self.compare(*self.arguments), rtol=self.rtol, atol=self.atol)


class WorkloadSuite(_RunSuite):
    """`overrides` make a run of `steps` steps short; every run takes place on the workload's own data."""

    kind = "workload"
    card_headings = WORKLOAD_CARD
    overrides: ClassVar[tuple[str, ...]] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        return (f"workload={self.name}", *self.overrides)

    def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(self, tmp_path: Path) -> None:
        arguments = (*self.arguments, f"stop.steps={self.steps}")
        again = run_ranks(*arguments, run_dir=tmp_path / "again").expect(4)
        other = run_ranks(*arguments, "seed=2", run_dir=tmp_path / "other").expect(4)
        assert again.result["parameters_sha256"] == self.run().result["parameters_sha256"]
        assert other.result["parameters_sha256"] != self.run().result["parameters_sha256"]

    def test_synthetic_data_gives_a_throughput_and_no_quality(self) -> None:
        result = cached_run(*self.arguments, "data=synthetic", "stop.steps=3").expect(0).result
        assert result["status"] == "throughput"
        assert result["time_to_train_s"] is None
        assert result["quality"] == {}
        assert result["samples_per_s"] > 0


class BackendSuite(PluginSuite):
    """Runs `toy`; skipped where this machine cannot run the backend."""

    kind = "backend"
    card_headings = BACKEND_CARD

    def _require_runnable(self) -> BackendSpec:
        spec = cast(BackendSpec, self.installed.load().spec)
        problem = spec.probe().problem
        if problem:
            pytest.skip(f"backend={self.name} cannot run here: {problem}")
        return spec

    def test_it_trains_and_proves_itself(self) -> None:
        self._require_runnable()
        outcome = cached_run("workload=toy", f"backend={self.name}").expect(0)
        assert outcome.evidence[self.name]["active"]

    @pytest.mark.distributed
    def test_its_collectives_serve_two_ranks(self) -> None:
        spec = self._require_runnable()
        if (spec.probe().count or 2) < 2:
            pytest.skip(f"backend={self.name} serves one rank here")
        outcome = cached_run("workload=toy", f"backend={self.name}", "launch.nproc=2").expect(0)
        assert outcome.evidence[self.name]["active"]

    def test_where_it_cannot_run_it_says_so_at_once(self, tmp_path: Path) -> None:
        spec = cast(BackendSpec, self.installed.load().spec)
        if not spec.probe().problem:
            pytest.skip(f"backend={self.name} can run here")
        refused = run_cli("workload=toy", f"backend={self.name}", run_dir=tmp_path / "run").expect(2)
        assert spec.probe().problem in refused.stderr
        assert not (tmp_path / "run").exists()


class TrackerSuite(PluginSuite):
    """Runs `toy` with the tracker and without any."""

    kind = "tracker"
    card_headings = TRACKER_CARD
    settings: ClassVar[tuple[str, ...]] = ()

    def test_it_leaves_the_plan_the_numbers_and_the_score_as_they_are(self) -> None:
        chosen = f"default_trackers=[{self.name}]"
        with_it = cached_run("workload=toy", chosen, *self.settings).expect(0).result
        without = cached_run("workload=toy", "default_trackers=[]").expect(0).result
        assert [tracker["name"] for tracker in with_it["trackers"]] == [self.name]
        for key in ("plan_hash", "parameters_sha256", "scored", "steps", "quality"):
            assert with_it[key] == without[key], key


class OptSuite(_RunSuite):
    """Runs `toy` (or `workload`) with and without the opt."""

    kind = "opt"
    card_headings = OPT_CARD
    workload: ClassVar[tuple[str, ...]] = ("workload=toy",)
    settings: ClassVar[tuple[str, ...]] = ()
    changes_by: ClassVar[float] = 0.1
    """Where numerics is "changes": the largest relative difference of a loss against the baseline's."""

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*self.workload, f"+opt={self.name}", *self.settings)

    @pytest.mark.numbers
    def test_its_declared_numerics_hold_against_the_baseline(self) -> None:
        declared = cast(OptSpec, self.installed.load().spec).numerics
        if declared == "tolerance":
            mine, baseline = self.compare(*self.arguments), self.compare(*self.workload)
            assert_close(mine, baseline, rtol=self.rtol, atol=self.atol)
            return
        mine, baseline = self.run(), cached_run(*self.workload, f"stop.steps={self.steps}").expect(4)
        if declared == "bitwise":
            assert mine.result["parameters_sha256"] == baseline.result["parameters_sha256"]
        else:
            assert mine.result["parameters_sha256"] != baseline.result["parameters_sha256"]
            torch.testing.assert_close(
                torch.tensor(mine.losses), torch.tensor(baseline.losses), rtol=self.changes_by, atol=self.changes_by
            )

    @pytest.mark.numbers
    def test_it_reaches_the_target_with_evidence(self) -> None:
        outcome = cached_run(*self.arguments).expect(0)
        assert outcome.evidence[self.name]["active"], outcome.evidence
        assert outcome.result["evidence"][self.name]["summary"]
