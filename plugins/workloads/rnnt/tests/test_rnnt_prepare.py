"""`core.prepare` on speech laid out as LibriSpeech, through the real command."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch

from core.api.errors import DataError
from core.testing.cli import run_cli
from core.testing.contexts import settings_that_are_prepared_with
from timetrial_rnnt.plugin import SPEC
from timetrial_rnnt.workload import RnntWorkload

MakeWorkload = Callable[..., RnntWorkload]
PrepareSpeech = Callable[..., "subprocess.CompletedProcess[str]"]
OfficialChecker = Callable[[Path], None]

PREPARED = ("vocab_size=16", "global_batch_size=8", "eval.batch_size=4")


def manifest(out: Path) -> dict[str, object]:
    return json.loads((out / "manifest.json").read_text())


def test_flac_and_wav_become_samples_transcripts_and_a_model(make: MakeWorkload, source: Path, prepared: Path) -> None:
    workload = make("rnnt_mlperf", *PREPARED, root=str(prepared))
    workload.check_data()
    assert (workload.train_samples, workload.eval_samples) == (40, 10)
    rows = [json.loads(line) for line in (prepared / "utterances.jsonl").read_text().splitlines()]
    wav = next(row for row in rows if row["id"] == "2-1-0003")
    number = [row["id"] for row in rows if row["part"] == "train"].index("2-1-0003")
    samples, _ = soundfile.read(source / "train-other-500/2/1/2-1-0003.wav", dtype="int16")
    assert np.array_equal((workload.corpus.audio("train", number) * 32768).astype(np.int16), samples)
    assert wav["text"] == workload.corpus.transcript("train", number)
    tokens = workload.corpus.tokens
    assert tokens.decode(tokens.encode(wav["text"])) == wav["text"]
    assert max(max(tokens.encode(row["text"])) for row in rows) < 16


def test_the_same_bytes_come_out_again_in_parallel_and_after_a_kill(
    prepare_speech: PrepareSpeech,
    prepare_command: Callable[..., list[str]],
    source: Path,
    prepared: Path,
    tmp_path: Path,
) -> None:
    assert prepare_speech(source, tmp_path / "again", "data.workers=2").returncode == 0
    assert manifest(tmp_path / "again")["files"] == manifest(prepared)["files"]
    out = tmp_path / "killed"
    process = subprocess.Popen(prepare_command(source, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out / ".notes").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert prepare_speech(source, out).returncode == 0
    assert manifest(out)["files"] == manifest(prepared)["files"]


def test_the_spec_names_the_settings_that_speech_is_prepared_with(source: Path, tmp_path: Path) -> None:
    assert settings_that_are_prepared_with(source, tmp_path, "rnnt_mlperf", "vocab_size=16") == SPEC.preparation


def test_finished_speech_serves_another_training_and_no_other_preparation(
    prepare_speech: PrepareSpeech, source: Path, prepared: Path
) -> None:
    before = manifest(prepared)
    training = ("workload.global_batch_size=8", "workload.ema=0", "workload.eval.batch_size=5")
    assert prepare_speech(source, prepared, *training).returncode == 0
    refused = prepare_speech(source, prepared, *training, "workload.max_duration=0.8")
    assert refused.returncode == 2
    assert "started with a different workload.max_duration (16.7, now 0.8)" in refused.stderr
    assert manifest(prepared) == before


def spoil(folder: Path) -> dict[str, str]:
    """One utterance of each kind that cannot be used. Returns file -> words of the reason."""
    chapter = folder / "train-clean-100" / "1" / "1"
    truncated = chapter / "1-1-0001.flac"
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    (chapter / "1-1-0002.flac").write_bytes(b"")
    (chapter / "1-1-0003.flac").write_bytes(b"no audio at all, not even nearly")
    (chapter / "1-1-0004.flac").unlink()
    soundfile.write(chapter / "1-1-0004.wav", np.zeros(0, np.float32), 16000)
    (chapter / "1-1-0011.flac").unlink()
    soundfile.write(chapter / "1-1-0011.wav", np.zeros(16000, np.float32), 16000)
    with (chapter / "1-1-0011.wav").open("r+b") as file:
        file.truncate(20000)
    soundfile.write(chapter / "1-1-0005.flac", np.zeros(8000, np.float32), 8000)
    soundfile.write(chapter / "1-1-0006.flac", np.zeros((16000, 2), np.float32), 16000)
    (chapter / "1-1-0007.flac").unlink()
    listing = chapter / "1-1.trans.txt"
    lines = listing.read_text().splitlines()
    lines[8] = "1-1-0008 "
    lines[9] = "1-1-0009 ALPHA 2"
    del lines[10]
    listing.write_text("\n".join(lines))
    return {
        "1-1-0001.flac": "cannot be read", "1-1-0002.flac": "cannot be read", "1-1-0003.flac": "cannot be read",
        "1-1-0004.wav": "holds no samples", "1-1-0005.flac": "sample rate is 8000 Hz", "1-1-0006.flac": "2 channels",
        "1-1-0007": "no audio file", "1-1-0008.flac": "transcript is empty", "1-1-0009.flac": "character '2'",
        "1-1-0010.flac": "has no transcript", "1-1-0011.wav": "truncated",
    }  # fmt: skip


def test_utterances_that_cannot_be_used_are_named_and_counted(
    prepare_speech: PrepareSpeech, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "speech")
    expected = spoil(tmp_path / "speech")
    stopped = prepare_speech(tmp_path / "speech", tmp_path / "out")
    assert stopped.returncode == 1
    assert "set data.max_bad=1 to skip it" in stopped.stderr and "Traceback" not in stopped.stderr
    allowed = prepare_speech(tmp_path / "speech", tmp_path / "out", f"data.max_bad={len(expected)}")
    assert allowed.returncode == 0, allowed.stderr
    assert f"{len(expected)} bad" in allowed.stdout
    bad = manifest(tmp_path / "out")["bad"]
    assert isinstance(bad, dict)
    reasons = {Path(name).name: reason for name, reason in bad.items()}
    assert reasons.keys() == expected.keys()
    assert {name: reason for name, reason in reasons.items() if expected[name] not in reason} == {}
    assert manifest(tmp_path / "out")["counts"]["training utterances"] == 29  # pyright: ignore[reportIndexIssue]


def test_long_utterances_are_left_out_of_training_only(
    prepare_speech: PrepareSpeech, make: MakeWorkload, source: Path, tmp_path: Path
) -> None:
    done = prepare_speech(source, tmp_path / "out", "workload.max_duration=0.8", "workload.tokens=letters",
                          "workload.vocab_size=28")  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = manifest(tmp_path / "out")["counts"]
    assert isinstance(counts, dict)
    left_out = counts["training utterances left out as too long"]
    assert left_out > 0 and counts["training utterances"] == 40 - left_out and counts["evaluation utterances"] == 10
    settings = ("max_duration=0.8", "tokens=letters", "vocab_size=28", "global_batch_size=8")
    workload = make("rnnt_mlperf", *settings, root=str(tmp_path / "out"))
    workload.check_data()
    assert workload.corpus.durations("train").max() <= 0.8 < workload.corpus.durations("eval").max()


def test_a_given_sentencepiece_model_is_taken(
    prepare_speech: PrepareSpeech, source: Path, prepared: Path, tmp_path: Path
) -> None:
    given = prepared / "sentencepiece.model"
    done = prepare_speech(source, tmp_path / "out", f"workload.sentencepiece_model={given}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "sentencepiece.model").read_bytes() == given.read_bytes()
    assert sentencepiece.SentencePieceProcessor(model_file=str(given)).get_piece_size() == 16
    other = prepare_speech(source, tmp_path / "2", f"workload.sentencepiece_model={given}", "workload.vocab_size=17")
    assert other.returncode == 1 and "has 16 pieces: set workload.vocab_size=16" in other.stderr


def test_a_folder_of_another_layout_and_a_vocabulary_too_large_are_errors(
    prepare_speech: PrepareSpeech, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    nothing = prepare_speech(tmp_path / "empty", tmp_path / "out")
    assert nothing.returncode == 1 and "lay it out as LibriSpeech" in nothing.stderr
    large = prepare_speech(source, tmp_path / "large", "workload.vocab_size=1023")
    assert large.returncode == 1 and "set a lower workload.vocab_size" in large.stderr


def test_settings_of_a_run_must_agree_and_damage_is_named(make: MakeWorkload, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prepared with workload.vocab_size=16, not 20"):
        make("rnnt_mlperf", "vocab_size=20", root=str(prepared)).check_data()
    with pytest.raises(DataError, match=r"core\.prepare workload=rnnt_mlperf"):
        make("rnnt_mlperf", root=str(tmp_path)).check_data()
    with pytest.raises(DataError, match=r"core\.prepare workload=rnnt source"):
        make("rnnt", root=str(tmp_path)).check_data()
    shutil.copytree(prepared, tmp_path / "copy")
    with (tmp_path / "copy" / "train" / "00001.pcm").open("r+b") as file:
        file.write(b"!")
    with pytest.raises(DataError, match=r"00001.pcm has changed"):
        make("rnnt_mlperf", *PREPARED, root=str(tmp_path / "copy")).check_data()


SHRUNKEN = ("encoder_hidden=32", "predictor_hidden=16", "joint_hidden=16", "max_symbols_per_frame=2")


@pytest.mark.realdata
def test_real_speech_is_prepared_trained_on_for_an_epoch_and_evaluated(
    prepare_speech: PrepareSpeech, real_speech: Path, tmp_path: Path
) -> None:
    done = prepare_speech(real_speech, tmp_path / "out", "workload.vocab_size=27")
    assert done.returncode == 0, done.stderr
    assert "343 training utterances, 87 evaluation utterances" in done.stdout
    settings = (*SHRUNKEN, "vocab_size=27", "global_batch_size=32")
    outcome = run_cli(
        "workload=rnnt_mlperf", f"data.root={tmp_path / 'out'}", "stop.epochs=1",
        *(f"workload.{setting}" for setting in settings), run_dir=tmp_path / "run",
    ).expect(4)  # fmt: skip
    assert outcome.result["samples"] == 343 and outcome.result["quality"]["word_error_rate"] > 0
    assert all(torch.isfinite(torch.tensor(outcome.losses)))


@pytest.mark.realdata
@pytest.mark.convergence
def test_real_speech_is_learned_and_the_log_passes_the_official_checker(
    prepare_speech: PrepareSpeech, official_checker: OfficialChecker, real_speech: Path, tmp_path: Path
) -> None:
    """The checker wants a word error rate below 1, which a first epoch does not give."""
    letters = ("workload.tokens=letters", "workload.vocab_size=28")
    assert prepare_speech(real_speech, tmp_path / "out", *letters).returncode == 0
    small = ("encoder_hidden=192", "predictor_hidden=96", "joint_hidden=128", "pre_layers=1", "post_layers=1")
    plain = ("encoder_dropout=0", "predictor_dropout=0", "joint_dropout=0", "predictor_layers=1", "init_scale=1")
    fast = ("global_batch_size=8", "base_learning_rate=0.01", "lr_warmup_epochs=1", "beta_2=0.99", "ema=0.98")
    outcome = run_cli(
        "workload=rnnt_mlperf", f"data.root={tmp_path / 'out'}", "stop.epochs=6", *letters,
        *(f"workload.{setting}" for setting in (*small, *plain, *fast)), run_dir=tmp_path / "run",
    ).expect(4)  # fmt: skip
    assert outcome.result["quality"]["word_error_rate"] < 1
    official_checker(outcome.run_dir)
