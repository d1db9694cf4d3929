"""Raw text to shards with the real command, and shards to batches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core.api.errors import DataError
from core.testing.contexts import settings_that_are_prepared_with
from timetrial_bert import prepare
from timetrial_bert.plugin import SPEC
from timetrial_bert.workload import BertWorkload

PrepareShards = Callable[..., subprocess.CompletedProcess[str]]
MakeWorkload = Callable[..., BertWorkload]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_second_preparation_and_one_that_was_killed_give_the_same_bytes(
    prepare_shards: PrepareShards,
    prepare_command: Callable[..., list[str]],
    source: Path,
    prepared: Path,
    tmp_path: Path,
) -> None:
    expected, out = contents(prepared), tmp_path / "killed"
    assert {name.partition("/")[0] for name in expected} == {"manifest.json", "vocab.txt", "train", "eval"}
    process = subprocess.Popen(prepare_command(source, out, "data.workers=1"), start_new_session=True)
    while not list(out.glob("train/*.arrow")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    again = prepare_shards(source, out)
    assert again.returncode == 0, again.stderr
    assert contents(out) == expected


def test_the_spec_names_the_settings_that_shards_are_made_with(source: Path, tmp_path: Path) -> None:
    settings = ("vocab_file=null", "vocab_size=150", "shard_mib=0.001", "held_out=0.2")
    assert settings_that_are_prepared_with(source, tmp_path / "out", "bert", *settings) == SPEC.preparation


def test_finished_shards_serve_another_training_and_no_other_preparation(
    prepare_shards: PrepareShards, source: Path, prepared: Path
) -> None:
    before = contents(prepared)
    training = ("workload.global_batch_size=8", "workload.dropout=0.3", "workload.eval.batch_size=5")
    assert prepare_shards(source, prepared, *training).returncode == 0
    refused = prepare_shards(source, prepared, *training, "workload.sequence_length=32")
    assert refused.returncode == 2
    assert "started with a different workload.sequence_length (64, now 32)" in refused.stderr
    assert contents(prepared) == before


def test_broken_and_empty_files_are_named_and_may_be_passed_over(
    prepare_shards: PrepareShards, source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "good.txt").write_bytes((source / "0.txt").read_bytes())
    (folder / "broken.txt").write_bytes(b"caf\xe9 society")
    (folder / "empty.txt").write_bytes(b"")
    refused = prepare_shards(folder, tmp_path / "out", "workload.held_out=0.4")
    assert refused.returncode == 1
    assert "broken.txt: it is not UTF-8 (byte 3)" in refused.stderr
    passed = prepare_shards(folder, tmp_path / "out", "workload.held_out=0.4", "data.max_bad=2")
    assert passed.returncode == 0, passed.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {Path(name).name for name in manifest["bad"]} == {"broken.txt", "empty.txt"}


def test_too_little_text_is_an_error(prepare_shards: PrepareShards, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One sentence. Another one.")
    done = prepare_shards(tmp_path, tmp_path.with_name("out"))
    assert done.returncode == 1
    assert "too little text" in done.stderr


def test_no_document_is_both_trained_on_and_held_out(source: Path, tmp_path: Path) -> None:
    note = prepare.extract(tmp_path / "0.txt", source / "0.txt", 500)
    pieces = [("0.txt", *piece) for piece in note["pieces"]]
    assert len(pieces) > 2
    settings = {"out": tmp_path, "seed": 1, "held_out": 0.3}
    train, held_out = (list(prepare._documents(pieces, part, settings)) for part in ("train", "eval"))
    assert len(train) + len(held_out) == note["documents"] == 12
    assert train and held_out
    assert not {tuple(d) for d in train} & {tuple(d) for d in held_out}
    whole = [("0.txt", 0, (tmp_path / "0.txt").stat().st_size, 0)]
    assert list(prepare._documents(whole, "train", settings)) == train


SHARDS = ("init_checkpoint=null", "global_batch_size=16", "vocab_file=null", "vocab_size=150")


def test_shards_feed_a_run_and_settings_must_agree(make: MakeWorkload, prepared: Path) -> None:
    workload = make("bert", *SHARDS, root=str(prepared))
    workload.check_data()
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert workload.train_samples == manifest["counts"]["training examples"]
    with pytest.raises(DataError, match=r"prepared with workload.sequence_length=64, not 32"):
        make("bert", *SHARDS, "sequence_length=32", root=str(prepared)).check_data()
    with pytest.raises(DataError, match=r"not the starter checkpoint's vocabulary"):
        make("bert", *SHARDS, "init_checkpoint=starter", root=str(prepared)).check_data()
    with pytest.raises(DataError, match=r"set workload.vocab_size to at least as many"):
        make("bert", *SHARDS, "vocab_size=100", root=str(prepared)).check_data()
    with pytest.raises(DataError, match=r"core\.prepare"):
        make("bert", *SHARDS, root=str(prepared.parent)).check_data()


def test_a_damaged_shard_is_named(make: MakeWorkload, source: Path, prepared: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = next(copy.glob("train/*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=rf"{shard.name} has changed"):
        make("bert", *SHARDS, root=str(copy)).check_data()


@pytest.mark.parametrize("masking", ["dynamic", "static"])
def test_every_example_comes_once_an_epoch_alike_for_every_world_size_and_resumed(
    prepare_shards: PrepareShards, make: MakeWorkload, source: Path, prepared: Path, tmp_path: Path, masking: str
) -> None:
    root = prepared
    if masking == "static":
        root = tmp_path / "static"
        assert prepare_shards(source, root, "workload.masking=static", "workload.duplicates=2").returncode == 0

    def epoch(first: int, world: int) -> list[dict[str, torch.Tensor]]:
        ranks = []
        for rank in range(world):
            workload = make("bert", *SHARDS, f"masking={masking}", rank=rank, world=world, root=str(root))
            workload.check_data()
            ranks.append([batch.data for batch in workload.batches(2, first)])
        return [{k: torch.cat([d[k] for d in step]) for k in step[0]} for step in zip(*ranks, strict=True)]

    one, two, rest = epoch(0, 1), epoch(0, 2), epoch(3, 1)
    assert len(one) == len(two) == len(rest) + 3
    for data, of_two in zip(one, two, strict=True):
        assert all(torch.equal(data[k], of_two[k]) for k in data)
        used = data["masked_labels"] != -100
        assert data["mlm_scale"][0] == pytest.approx(len(used) / int(used.sum()))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one[3:], rest, strict=True) for k in a)
    examples = json.loads((root / "manifest.json").read_text())["counts"]["training examples"]
    assert sum(len(d["input_ids"]) for d in one) == examples


def test_evaluation_examples_do_not_depend_on_the_seed(make: MakeWorkload, prepared: Path) -> None:
    def rows(seed: int, *more: str) -> torch.Tensor:
        workload = make("bert", *SHARDS, *more, seed=seed, root=str(prepared))
        workload.check_data()
        return torch.cat([data["input_ids"] for data in workload._eval_batches()])

    whole = rows(1)
    assert torch.equal(whole, rows(2))
    some = rows(1, "max_eval_samples=5")
    assert len(some) == 5
    assert torch.equal(some, whole[[i * len(whole) // 5 for i in range(5)]])


@pytest.mark.realdata
def test_real_text_is_prepared_trained_on_and_evaluated(
    prepare_shards: PrepareShards, make: MakeWorkload, real_text: Path, tmp_path: Path
) -> None:
    done = prepare_shards(real_text, tmp_path / "out", "workload.vocab_file=starter", "workload.shard_mib=1")
    assert done.returncode == 0, done.stderr
    workload = make("bert", "init_checkpoint=starter", root=str(tmp_path / "out"))
    workload.check_data()
    assert workload.train_samples > 5000
    model = workload.build_model()
    batch = next(iter(workload.batches(1, 0)))
    assert torch.isfinite(workload.loss(model, batch.data)["loss"])
    model.eval()
    with torch.no_grad():
        assert 0.05 < workload.evaluate(model)["masked_lm_accuracy"] < 1
