"""The network: its sizes, its names in the closed rules, and reading one back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from core.api.errors import UsageError
from timetrial_minigo import network

pytestmark = pytest.mark.numbers

CPU = torch.device("cpu")
SIZES = network.Sizes(
    board=5, history=2, width=8, blocks=2, policy_channels=2, value_channels=1, value_hidden=16
)  # fmt: skip


def built(sizes: network.Sizes = SIZES, seed: int = 1) -> network.PolicyValueNet:
    model = network.PolicyValueNet(sizes, network.batch_norm(False, CPU))
    network.initialise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def test_it_gives_a_logit_for_each_move_and_a_value_between_minus_one_and_one() -> None:
    logits, value = built()(torch.randn(7, 5, 5, 5))
    assert logits.shape == (7, 26) and value.shape == (7,)
    assert (value.abs() <= 1).all() and logits.std() > 0.01


def test_the_closed_network_has_the_references_size() -> None:
    """By hand: 3 x 3 convolutions of 17 and 32 channels, scales and shifts, heads, three dense layers."""
    sizes = network.Sizes(
        board=19, history=8, width=32, blocks=6, policy_channels=2, value_channels=1, value_hidden=64
    )  # fmt: skip
    trunk = 9 * 17 * 32 + 12 * 9 * 32 * 32 + 13 * 2 * 32
    policy, value = 32 * 2 + (2 * 361 + 1) * 362, 32 * 1 + (361 + 1) * 64 + 64 + 1
    model = built(sizes)
    assert sum(p.numel() for p in model.parameters()) == trunk + policy + value
    assert len(network.closed_names(6)) == len(list(model.parameters())) + 1  # and global_step


def test_biases_and_shifts_do_not_decay_and_every_parameter_is_in_one_group() -> None:
    model = built()
    decaying, others = (group["params"] for group in network.parameter_groups(model, 0.1))
    assert len(decaying) + len(others) == len(list(model.parameters()))
    scales = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
    assert all(any(s is p for p in decaying) for s in scales)
    assert all(p.ndim == 1 for p in others)


@pytest.mark.parametrize("sizes", [SIZES, replace(SIZES, board=3, history=1, blocks=0, policy_channels=1)])
def test_a_network_is_read_back_from_a_file_of_its_tensors_or_from_a_run_folder(
    tmp_path: Path, sizes: network.Sizes
) -> None:
    model, older = built(sizes), built(sizes, seed=2)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "net.safetensors")
    for step, of in ((7, older), (12, model)):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        tensors = {f"shared/model/{name}": tensor for name, tensor in of.state_dict().items()}
        safetensors.torch.save_file({**tensors, "shared/optimizer/x": torch.zeros(1)}, folder / "shared.safetensors")
    planes = torch.randn(3, 2 * sizes.history + 1, sizes.board, sizes.board)
    for place in ("net.safetensors", "run"):
        restored = network.read(tmp_path / place)
        assert restored.sizes == sizes
        assert all(torch.equal(a, b) for a, b in zip(restored(planes), model(planes), strict=True))


def test_what_is_no_network_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    safetensors.torch.save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for place, words in (
        ("nowhere", "no trained network at"),
        ("", "no trained network at"),
        ("text", "is not a safetensors file"),
        ("other.safetensors", "does not hold a network of timetrial-minigo"),
    ):
        with pytest.raises(UsageError, match=words):
            network.read(tmp_path / place)
