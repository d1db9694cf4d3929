"""A sidecar answers in order, its failures are one line, and it never outlives its rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from core.api.mesh import DATA, Mesh, arrange
from core.api.sidecar import Sidecar
from core.api.types import RunContext
from core.compose.composition import compose
from core.compose.discovery import discover
from core.compose.resolve import resolve
from core.engine import sidecar
from core.engine.build import build_for_inference
from core.testing.cli import environment

SERVING = """
import os
import time

import torch

def serve(ctx):
    def answer(request):
        command, value = request
        return {"double": double, "quality": quality, "place": place, "threads": threads, "gather": gather,
                "fail": fail, "sleep": time.sleep, "exit": os._exit}[command](value)

    def double(value):
        return {"twice": 2 * value, "of": ctx.sidecar}

    def quality(weights):
        ctx.model.load_state_dict(weights)
        return ctx.evaluate()

    def place(_):
        return ctx.rank, ctx.world_size, ctx.data_rank, ctx.data_size, str(ctx.device)

    def threads(_):
        return torch.get_num_threads()

    def gather(value):
        return ctx.gather([value])

    def fail(words):
        raise ValueError(words)

    return answer

def refuse(ctx):
    raise RuntimeError("no board\\nto play on")
"""
PROGRAM = """
import sys, time
from pathlib import Path
import psutil
from tests_of_sidecar import rank_with_sidecar

if __name__ == "__main__":
    helper = rank_with_sidecar(Path(sys.argv[1]))
    if sys.argv[2] != "building":
        assert not helper.ready().problem
    if sys.argv[2] == "answering":
        helper.ask(("sleep", 600))
    print(*[process.pid for process in psutil.Process().children()], flush=True)
    if sys.argv[2] != "ending":
        time.sleep(600)
"""


def rank(run_dir: Path) -> tuple[RunContext, object]:
    """A rank of `toy` that has not built anything yet, and its plan."""
    registry = discover()
    plan = resolve(*compose(["workload=toy", "seed=1"], registry), registry)
    ctx = RunContext(config=plan.root, run_dir=run_dir, seed=plan.seed)
    ctx.mesh = Mesh(plan.dimensions)
    return ctx, plan


def rank_with_sidecar(run_dir: Path, serve: str = "serving:serve") -> Sidecar:
    ctx, plan = rank(run_dir)
    return sidecar.start(ctx, plan, "helper", serve, "cpu", 1)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module that serves, which new processes find."""
    (tmp_path / "serving.py").write_text(SERVING)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def end(helper: Sidecar) -> None:
    """Has its process exit, so that no test leaves one behind."""
    helper.ask(("exit", 0))
    assert helper.answer().problem


def test_it_answers_in_order_and_tells_the_seconds(serving: Path) -> None:
    helper = rank_with_sidecar(serving)
    helper.ask(("double", torch.arange(3)))  # while it still builds its model
    helper.ask(("sleep", 0.2))
    helper.ask(("threads", None))
    first, second, third = (helper.answer() for _ in range(3))
    assert torch.equal(first.value["twice"], torch.tensor([0, 2, 4])) and first.value["of"] == "helper"
    assert second.value is None and second.seconds >= 0.2
    assert third.value == 1 and not third.problem
    assert not helper.has_answered()
    end(helper)


def test_it_evaluates_the_weights_that_it_is_sent_as_the_rank_would(serving: Path) -> None:
    helper = rank_with_sidecar(serving)
    ctx, plan = rank(serving)
    ctx.backend = sidecar._Apart(ctx.mesh, torch.device("cpu"))
    build_for_inference(ctx, plan)  # pyright: ignore[reportArgumentType]
    qualities = list[object]()
    for _ in range(2):
        torch.manual_seed(len(qualities))
        for parameter in ctx.model.parameters():
            torch.nn.init.normal_(parameter)
        qualities.append(ctx.evaluate())
        helper.ask(("quality", ctx.model.state_dict()))
    assert [helper.answer().value, helper.answer().value] == qualities
    assert qualities[0] != qualities[1]
    end(helper)


@pytest.mark.parametrize(("alone", "place"), [(True, (0, 1, 0, 1, "cpu")), (False, (3, 4, 3, 4, "cpu"))])
def test_it_is_alone_or_has_its_ranks_place_and_reaches_no_other_rank(
    serving: Path, alone: bool, place: tuple[int, ...]
) -> None:
    ctx, plan = rank(serving)
    ctx.mesh = Mesh(arrange([DATA], 4), 3)
    helper = sidecar.start(ctx, plan, "helper", "serving:serve", "cpu", 1, alone)  # pyright: ignore[reportArgumentType]
    helper.ask(("place", None))
    assert helper.answer().value == place
    helper.ask(("gather", 7))
    answer = helper.answer()
    if alone:
        assert answer.value == [[7.0]]
        end(helper)
    else:
        assert answer.problem == "RuntimeError: a sidecar cannot take part in exchanges between ranks"


def test_one_that_cannot_be_built_says_why_in_one_line_each_time_it_is_asked(serving: Path) -> None:
    helper = rank_with_sidecar(serving, "serving:refuse")
    helper.ask(("double", 1))
    assert helper.answer().problem == helper.ready().problem == "RuntimeError: no board to play on"


def test_one_that_fails_or_exits_is_one_line(serving: Path) -> None:
    failing, exiting = rank_with_sidecar(serving), rank_with_sidecar(serving)
    failing.ask(("fail", "a\nb"))
    exiting.ask(("exit", 3))
    assert failing.answer().problem == "ValueError: a b"
    assert exiting.answer().problem == "the process exited unexpectedly (out of memory?)"
    exiting.ask(("double", 1))
    assert exiting.has_answered() and exiting.answer().problem


@pytest.fixture
def program(serving: Path) -> Path:
    """A rank as a program: `program.py FOLDER WHEN` prints its sidecar's process."""
    (serving / "program.py").write_text(PROGRAM)
    (serving / "tests_of_sidecar.py").write_text(Path(__file__).read_text())
    return serving / "program.py"


def begin(program: Path, when: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A rank in its own process, and its sidecar's process."""
    command = [sys.executable, str(program), str(program.parent), when]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout
    children = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert children
    return process, children


@pytest.mark.parametrize("when", ["building", "answering"])
def test_it_ends_when_its_rank_is_killed(program: Path, when: str) -> None:
    process, children = begin(program, when)
    process.kill()
    process.wait(60)
    assert psutil.wait_procs(children, timeout=60)[1] == []


def test_none_is_left_when_its_rank_comes_to_its_end(program: Path) -> None:
    process, children = begin(program, "ending")
    assert process.wait(60) == 0
    assert psutil.wait_procs(children, timeout=60)[1] == []
