"""Every opt on every workload, and every pair of opts on a workload that offers both, has the verdict that was agreed
in tests/matrix.json. Minutes: `-m matrix`. `tools/matrix.py` runs the same compositions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from core.testing.fixtures import FakePlugin
from core.testing.matrix import installed_opts, pairs

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from matrix import TRIPLES, WORKLOADS, agreed, differences, try_alone, try_together


@pytest.mark.matrix
@pytest.mark.distributed
@pytest.mark.unsampled
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("opt", sorted(installed_opts()))
def test_an_opt_alone_has_the_agreed_verdict(opt: str, workload: str) -> None:
    cell = try_alone(opt, workload)
    assert cell.verdict == agreed()["alone"][workload][opt], cell.words


@pytest.mark.matrix
@pytest.mark.distributed
@pytest.mark.parametrize("opts", [*pairs(), *TRIPLES], ids="+".join)
def test_opts_together_have_the_agreed_verdict(opts: tuple[str, ...]) -> None:
    workload, cell = try_together(opts)
    assert cell.verdict == agreed()["together"]["+".join(opts)][1], f"{workload}: {cell.words}"


PLANTED = """
class P(Plugin):
    spec = OptSpec(interface=2, summary="does nothing", numerics="bitwise")
    Config = Config

    @hookimpl
    def check(self, plan):
        {check}

    @hookimpl
    def verify(self):
        return Evidence(plugin="planted", active=True, summary="does nothing, and says so")
"""
WRONG = {
    "not_offered": "raise NotOfferedError('the toy has nothing for this')",
    "conflict": "raise ConflictError('nothing goes with this')",
    "broken": "raise UsageError('this cannot be')",  # a refusal of no kind that a composition may end in
}


@pytest.mark.parametrize("verdict", ["bitwise", *WRONG])
def test_a_new_opt_that_refuses_wrongly_turns_the_matrix_red(
    verdict: str, fake_plugin: FakePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was agreed that the opt trains with the same bits; what it does instead is a difference."""
    site = fake_plugin("opt", "planted", PLANTED.format(check=WRONG.get(verdict, "pass")))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(str(site))
    installed_opts.cache_clear()
    try:
        cell = try_alone("planted", "toy")
    finally:
        installed_opts.cache_clear()
    assert cell.verdict == verdict, cell.words
    agreed_on = {"alone": {"toy": {"planted": "bitwise"}}, "together": {}}
    found = {"alone": {"toy": {"planted": cell.verdict}}, "together": {}}
    assert differences(found, agreed_on) == ([] if verdict == "bitwise" else [f"planted on toy: bitwise -> {verdict}"])


def test_every_installed_opt_and_pair_has_an_agreed_verdict_and_none_is_broken() -> None:
    """So that a new opt is red until someone agrees to its row."""
    verdicts, opts = agreed(), set(installed_opts())
    assert {workload: set(cells) for workload, cells in verdicts["alone"].items()} == dict.fromkeys(WORKLOADS, opts)
    assert set(verdicts["together"]) == {"+".join(names) for names in [*pairs(), *TRIPLES]}
    assert "broken" not in str(verdicts)
