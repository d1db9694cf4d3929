"""The Triton kernel, in Triton's interpreter, and compiled for a GPU that need not be there."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from timetrial_lean_transducer import lattice

pytestmark = pytest.mark.numbers

triton = pytest.importorskip("triton")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> ModuleType:
    """The module, decorated for the interpreter or, where the test says so, for the compiler."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", getattr(request, "param", "1"))
    from timetrial_lean_transducer import kernel

    return importlib.reload(kernel)


def example() -> tuple[Tensor, Tensor, lattice.Cells]:
    cells = lattice.all_cells(6, 4, torch.tensor([6, 2, 4]), torch.tensor([1, 3, 0]))
    scores_2N = torch.randn(2, len(cells), generator=torch.Generator().manual_seed(0)) - 1
    return scores_2N[0], scores_2N[1], cells


def test_it_gives_the_posteriors_of_the_torch_recursion(kernel: ModuleType) -> None:
    for mine, other in zip(
        lattice.posteriors(*example(), "triton"), lattice.posteriors(*example(), "torch"), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_it_hands_on_what_is_infinite_or_no_number(kernel: ModuleType) -> None:
    for bad in (-torch.inf, torch.nan):
        blank_N, label_N, cells = example()
        blank_N[5] = bad
        mine = lattice.posteriors(blank_N, label_N, cells, "triton")
        other = lattice.posteriors(blank_N, label_N, cells, "torch")
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("kernel", ["0"], indirect=True)
def test_it_compiles_and_its_threads_wait_for_each_other_after_each_row(kernel: ModuleType) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"scores_ptr": "*fp64", "arrows_ptr": "*fp64", "rows": "i32", "width": "i32", "places": "i32"}
    source = ASTSource(
        fn=kernel._descend, signature={**types, "BLOCK": "constexpr"}, constexprs={"BLOCK": 128}
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    body = compiled.asm["ptx"].partition("Inner Loop Header")
    assert "bar.sync" in body[0] + body[2]
