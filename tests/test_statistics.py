"""Races and spreads: what every program that measures speed relies on."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest

from core.api.errors import TimetrialError
from core.api.statistics import Spread, processes, race, ratios, spread, table


def test_a_spread_is_the_median_the_least_and_the_most() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == Spread(median=2.5, least=1.0, most=10.0, n=4)


def test_a_spread_writes_its_numbers_in_the_given_format() -> None:
    assert f"{spread([1661, 1700, 1747]):,.0f}" == "1,700 (1,661 to 1,747)"
    assert f"{spread([-0.5, 0.25]):+.1%}" == "-12.5% (-50.0% to +25.0%)"


def test_contenders_take_turns_and_each_comes_first_equally_often() -> None:
    turns: list[str] = []

    def turn(name: str) -> int:
        turns.append(name)
        return len(turns)

    results = race({name: partial(turn, name) for name in "abc"}, rounds=3)
    assert "".join(turns) == "abcbcacab"
    assert results == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_a_warm_up_round_is_run_and_not_counted() -> None:
    values = iter([100, 1, 2])
    assert race({"a": lambda: next(values)}, rounds=2, warmup=1) == {"a": [1, 2]}


def test_a_race_with_a_title_tells_its_progress_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    race({"a": int}, rounds=2, title="go")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "go: round 1 of 2 done\ngo: round 2 of 2 done\n")


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_contenders_may_be_processes_that_answer_a_line_with_json() -> None:
    code = "import json, sys\nfor number, _ in enumerate(sys.stdin): print(json.dumps([{!r}, number]), flush=True)"
    commands = {name: [sys.executable, "-c", code.format(name)] for name in ("a", "b")}
    with processes(commands) as contenders:
        assert race(contenders, rounds=2) == {"a": [["a", 0], ["a", 1]], "b": [["b", 0], ["b", 1]]}


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "input(); raise SystemExit(3)"])
def test_a_process_that_ends_instead_of_answering_is_named_with_its_status(code: str) -> None:
    with (
        pytest.raises(TimetrialError, match="a ended with status 3"),
        processes({"a": [sys.executable, "-c", code]}) as contenders,
    ):
        contenders["a"]()


def test_a_table_is_markdown() -> None:
    assert table(["name", "n"], [["a", 1], ["b", 2]]) == "| name | n |\n|---|---|\n| a | 1 |\n| b | 2 |"


def test_it_imports_without_torch() -> None:
    code = "import sys, core.api.statistics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
