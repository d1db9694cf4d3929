"""tools/gpu_check.py: its judgement, its path without an installation, and its sections on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from core.api.types import OptSpec
from core.testing.cli import environment

TOOLS = Path(__file__).resolve().parent.parent / "tools"
pytestmark = pytest.mark.skipif(not TOOLS.is_dir(), reason="tools are not part of the product")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_check

    return gpu_check


def ended(tool: ModuleType, *losses: float, code: int = 4, parameters: str = "", **evidence: Any) -> Any:
    proofs = {name: {"active": True, **more} for name, more in evidence.items()}
    return tool.Run(code, "words", 1.0, list(losses), parameters=parameters, evidence=proofs)


@pytest.mark.parametrize(
    ("declared", "losses", "verdict"),
    [
        ("bitwise", (2.0, 1.0), "bitwise"),
        ("bitwise", (2.0, 1.0000001), "broken"),
        ("tolerance", (2.0, 1.001), "tolerance"),
        ("tolerance", (2.0, 1.1), "broken"),
        ("changes", (2.0, 1.1), "changes"),
        ("changes", (2.0, float("nan")), "broken"),
        ("changes", (2.0,), "broken"),
    ],
)
def test_an_opt_must_keep_what_it_declares(tool: ModuleType, declared: str, losses: Any, verdict: str) -> None:
    eager = ended(tool, 2.0, 1.0)
    assert tool.judge(ended(tool, *losses, x={}), eager, ["x"], {"x": declared})[0] == verdict


def test_an_opt_without_evidence_is_broken_and_a_refusal_is_none(tool: ModuleType) -> None:
    eager = ended(tool, 1.0)
    silent = ended(tool, 1.0, x={"active": False, "summary": "nothing ran"})
    assert tool.judge(silent, eager, ["x"], {"x": "bitwise"}) == ("broken", "no evidence: nothing ran")
    assert tool.judge(ended(tool, code=2), eager, ["x"], {"x": "bitwise"}) == ("refused", "words")
    assert tool.judge(ended(tool, code=1), eager, ["x"], {"x": "bitwise"}) == ("broken", "exit 1: words")


def test_evidence_may_say_that_the_numbers_are_kept_better_than_declared(tool: ModuleType) -> None:
    mine = ended(tool, 1.0, parameters="a", x={"numerics": "bitwise"})
    assert tool.judge(mine, ended(tool, 1.0, parameters="b"), ["x"], {"x": "tolerance"})[0] == "broken"


def spec(**more: Any) -> OptSpec:
    return OptSpec(interface=2, summary="", numerics="bitwise", **more)


def test_all_opts_means_those_that_one_device_can_run_together(tool: ModuleType) -> None:
    opts = {
        "a": spec(),
        "b": spec(conflicts={"a": "why"}),
        "c": spec(claims=frozenset({"x"})),
        "d": spec(claims=frozenset({"x"})),
        "e": spec(requires=frozenset({"multi_rank"})),
        "fsdp": spec(),
        "g": spec(requires=frozenset({"cuda"})),
    }
    check = tool.Check(device="cuda", opts=opts, workloads=[], jobs=1)
    assert tool.fitting(check) == ["a", "c", "g"]


def test_opts_that_the_workload_refuses_are_left_out_of_all(tool: ModuleType) -> None:
    class Answers(tool.Check):
        def run(self, *overrides: str) -> Any:
            opts = overrides[-1].removeprefix("opt=[").removesuffix("]").split(",")
            if "b" in opts:
                return tool.Run(2, "opt 'b' acts on bert.encoder, which nothing here offers", 1.0)
            return tool.Run(0, "", 1.0, speeds=[1.0, 50.0, 100.0, 110.0], evidence={o: {"active": True} for o in opts})

    check = Answers(device="cpu", opts={}, workloads=[], jobs=1, ceilings={"fp32": 2.0})
    row = tool._timed(check, [], ["a", "b", "c"], flops=1e10)
    refusing = Answers(device="cpu", opts={}, workloads=[], jobs=1)
    assert tool._timed(refusing, [], ["b"], flops=1e10)["verdict"] == "refused"
    assert row == {"opts": "a + c", "samples/s": 105.0, "TFLOP/s": 1.05, "share of ceiling": "52.5% of fp32"}


def test_a_run_that_the_end_of_its_section_cuts_off_is_not_held_against_it(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "run", lambda overrides, timeout: tool.Run(tool.CUT_OFF, "not finished", timeout))
    check = tool.Check(device="cpu", opts={}, workloads=[], jobs=1, deadline=tool.time.monotonic() + 10)
    with pytest.raises(tool.OutOfTime):
        check.run("workload=toy")
    check.deadline += tool.RUN_LIMIT
    assert check.run("workload=toy").code == tool.CUT_OFF


def test_a_failed_section_does_not_take_the_others_along(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(check: Any) -> Any:
        raise ValueError("no such device")

    monkeypatch.setitem(tool.SECTIONS, "ceiling", (fails, False))
    check = tool.Check(device="cpu", opts={}, workloads=[], jobs=1)
    section = tool.run_section("ceiling", check, 1.0)
    assert section["status"] == "failed: ValueError: no such device"
    assert tool.run_section("matrix", check, 1.0)["status"] == "not run: no CUDA device"
    assert tool.run_section("throughput", tool.Check("cpu", {}, ["toy"], 1), 0.0)["rows"][0]["words"] == tool.NOT_RUN
    report = {"problems": [], "sections": {"ceiling": section}}
    assert tool.broken(report) == ["ceiling: failed: ValueError: no such device"]


def test_plugins_are_found_in_a_checkout_that_is_not_installed(
    tool: ModuleType, tmp_path: Path, monkeypatch: Any
) -> None:
    """As on a machine that has only the checkout and a folder of wheels."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("missing_package", "torch"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
    monkeypatch.setattr(tool, "installed", lambda name: "2.11" if name == "torch" else None)
    paths = tool.make_site(tmp_path / "site", wheels)
    assert (tmp_path / "site/unpacked/missing_package.py").exists()
    assert not (tmp_path / "site/unpacked/torch.py").exists()  # the machine's own comes first
    code = "from core.compose.discovery import discover; r = discover(); print(*r.names('opt'), *r.names('workload'))"
    # Of the installed packages only those that discovery imports, so that no installed plugin is seen.
    import pluggy

    only = tmp_path / "only"
    only.mkdir()
    (only / "pluggy").symlink_to(Path(pluggy.__file__).parent)
    env = {**environment(), "PYTHONPATH": os.pathsep.join(map(str, [*paths, only]))}
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=env, check=True)
    assert {"amp", "cuda_graphs", "toy", "resnet", "count_flops", "plain_hook"} <= set(found.stdout.split())


@pytest.mark.convergence
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--cpu", "--opts", "amp,cuda_graphs", "--workloads", "toy"]
    done = subprocess.run([*command, "--out", str(tmp_path / "check")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["sections"]["ddp"]["status"] == report["sections"]["matrix"]["status"] == "not run: no CUDA device"
    verdicts = {row["opt"]: row["verdict"] for row in report["sections"]["correctness"]["rows"]}
    assert verdicts == {"amp": "changes", "cuda_graphs": "refused"}
    eager = next(row for row in report["sections"]["throughput"]["rows"] if row["variant"] == "eager fp32")
    assert eager["TFLOP/s"] > 0
    assert "## throughput" in (tmp_path / "check.md").read_text()
