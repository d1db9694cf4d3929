"""The embedded data, and how utterances are dealt out."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core.api.errors import DataError
from timetrial_rnnt import spoken, synthesis
from timetrial_rnnt.buckets import BucketSampler
from timetrial_rnnt.workload import RnntWorkload

MakeWorkload = Callable[..., RnntWorkload]


def sampler(rank: int = 0, world: int = 1, buckets: int = 4, count: int = 103) -> BucketSampler:
    durations = np.random.default_rng(0).uniform(1, 15, count)
    return BucketSampler(durations=durations, buckets=buckets, global_batch=8, rank=rank, world_size=world)


@pytest.mark.parametrize("count", [103, 104, 105])
def test_every_utterance_comes_once_an_epoch_and_alike_for_every_world_size(count: int) -> None:
    for buckets in (1, 4):
        ones = [share.indices for share in sampler(buckets=buckets, count=count).epoch(7)]
        assert sorted(np.concatenate(ones)) == list(range(count))
        ranks = [list(sampler(rank, 2, buckets, count).epoch(7)) for rank in range(2)]
        merged = [set(a.indices) | set(b.indices) for a, b in zip(*ranks, strict=True)]
        assert merged[:-1] == [set(indices) for indices in ones[: len(merged) - 1]]
        assert sorted(i for shares in ranks for share in shares for i in share.indices) == list(range(count))
        weights = [sum(shares[k].weight for shares in ranks) for k in range(len(merged))]
        assert weights == pytest.approx([2.0] * len(merged))


def test_the_rest_of_an_epoch_is_what_it_would_have_been() -> None:
    whole, rest = list(sampler().epoch(3)), list(sampler().epoch(3, 5))
    assert [share.indices.tolist() for share in rest] == [share.indices.tolist() for share in whole[5:]]
    assert [share.indices.tolist() for share in sampler().epoch(4)] != [share.indices.tolist() for share in whole]


def test_a_batch_comes_from_one_bucket() -> None:
    bucketed, plain = sampler(count=400), sampler(buckets=1, count=400)
    spread = [np.mean([np.ptp(s.durations[share.indices]) for share in s.epoch(1)]) for s in (bucketed, plain)]
    assert spread[0] < spread[1] / 2


def test_batches_can_be_taken_up_in_the_middle_of_an_epoch(make: MakeWorkload) -> None:
    workload = make("rnnt")
    workload.check_data()
    whole = list(itertools.islice(workload.batches(2, 0), 5))
    for expected, found in zip(whole[3:], workload.batches(2, 3), strict=False):
        assert all(torch.equal(expected.data[name], found.data[name]) for name in expected.data)
    assert not torch.equal(whole[0].data["features"], next(iter(workload.batches(3, 0))).data["features"])


def test_the_synthesis_speaks_the_same_bits_again() -> None:
    def say(order: str) -> dict[str, str]:
        code = (
            "import hashlib, sys; from timetrial_rnnt import synthesis; speak, rate = synthesis.load()\n"
            "for voice in sys.argv[1].split(','):\n"
            "    print(voice, hashlib.sha256(speak(voice, 'one two', 170, 50, 3).tobytes()).hexdigest())"
        )
        done = subprocess.run([sys.executable, "-c", code, order], capture_output=True, text=True, check=True)
        return dict(line.split() for line in done.stdout.splitlines())

    first = say("Alicia,whisper,f2,m1")
    assert len(set(first.values())) == 4
    assert say("Alicia,whisper,f2,m1") == first


def test_held_out_voices_have_no_siblings_that_are_trained_on() -> None:
    voices = synthesis.voices()
    held_out = {name for name, out in voices if out}
    families = Counter(name.lower().rstrip("0123456789") for name, _ in voices)
    assert len(held_out) == 15 and len(voices) == 104
    assert all(families[name.lower().rstrip("0123456789")] == 1 for name in held_out)


def test_evaluation_is_on_held_out_voices_and_every_digit(make: MakeWorkload) -> None:
    workload = make("rnnt")
    workload.check_data()
    with np.load(spoken.cached()) as file:
        voices, held_out = file["voices"], file["held_out"]
    assert not set(voices[held_out]) & set(voices[~held_out])
    assert (workload.train_samples, workload.eval_samples) == (1780, 450)
    said = Counter(w for i in range(450) for w in workload.corpus.transcript("eval", i).split())
    assert set(said) == set(synthesis.DIGITS)
    most = max(said.values()) / said.total()
    assert workload.targets[0].value < (1 - most) / 5  # always the same word: an error rate of at least 1 - most


def test_a_damaged_cache_is_spoken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(spoken, "_synthesise", lambda path: path.write_bytes(b"spoken"))
    path = spoken.cached()
    assert path.is_relative_to(tmp_path) and path.read_bytes() == b"spoken"
    stamp = path.stat().st_mtime_ns
    assert spoken.cached() == path and path.stat().st_mtime_ns == stamp
    path.write_bytes(b"spoke")
    assert spoken.cached().read_bytes() == b"spoken"
    assert [p.name for p in path.parent.iterdir() if p.is_dir()] == []


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"set XDG_CACHE_HOME"):
        spoken.cached()


def test_a_synthesis_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "espeakng_loader.py").write_text("raise OSError('no library here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"no library here; reinstall the package espeakng-loader"):
        spoken.cached()
    assert list((tmp_path / "cache").rglob("*.npz")) == []
