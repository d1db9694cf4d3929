"""Log-mel features against their definition in numpy, and augmentation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchaudio

from timetrial_rnnt import features
from timetrial_rnnt.workload import RnntWorkload

pytestmark = pytest.mark.numbers

MakeWorkload = Callable[..., RnntWorkload]


def by_definition(audio: np.ndarray, bands: int) -> np.ndarray:
    """The reference's features (common/data/features.py), frame by frame, [bands, frames]."""
    emphasised = np.concatenate([audio[:1], audio[1:] - 0.97 * audio[:-1]]).astype(np.float64)
    padded = np.pad(emphasised, 256)
    window = np.pad(np.hanning(320), (512 - 320) // 2)
    spectra = [np.abs(np.fft.rfft(padded[start : start + 512] * window)) ** 2 for start in range(0, len(audio), 160)]
    scale = torchaudio.functional.melscale_fbanks(257, 0.0, 8000.0, bands, 16000, norm="slaney", mel_scale="slaney")
    logs = np.log(np.array(spectra) @ scale.double().numpy() + 1e-20).T
    return (logs - logs.mean(1, keepdims=True)) / (logs.std(1, ddof=1, keepdims=True) + 1e-5)


def noise(samples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.cumsum(rng.standard_normal(samples)) * 0.01 + 0.1 * rng.standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("samples", [16000, 7999, 161])
def test_features_are_the_definitions(samples: int) -> None:
    audio = noise(samples, samples)
    found, frames = features.log_mel(torch.from_numpy(audio)[None], torch.tensor([samples]), 80)
    assert frames.item() == found.shape[2] == features.frame_count(samples) == -(-samples // 160)
    np.testing.assert_allclose(found[0].numpy(), by_definition(audio, 80), atol=2e-3)


def test_the_features_of_an_utterance_do_not_depend_on_its_neighbours() -> None:
    sounds = [torch.from_numpy(noise(samples, samples)) for samples in (9000, 16000, 3210)]
    lengths = torch.tensor([len(sound) for sound in sounds])
    batch, frames = features.log_mel(torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True), lengths, 80)
    for row, sound in enumerate(sounds):
        alone, _ = features.log_mel(sound[None], lengths[row : row + 1], 80)
        torch.testing.assert_close(batch[row, :, : frames[row]], alone[0], atol=1e-4, rtol=1e-4)
        assert not batch[row, :, frames[row] :].any()


def test_spliced_frames_lie_end_to_end() -> None:
    log_mels = torch.arange(2 * 3 * 7, dtype=torch.float32).reshape(2, 3, 7)
    spliced, lengths = features.splice(log_mels, torch.tensor([7, 4]), 3, multiple=4)
    assert spliced.shape == (2, 4, 9) and lengths.tolist() == [3, 2]
    assert torch.equal(spliced[1, 1], torch.cat([log_mels[1, :, 3], log_mels[1, :, 4], log_mels[1, :, 5]]))
    assert torch.equal(spliced[1, 2, :3], log_mels[1, :, 6]) and not spliced[1, 2, 3:].any()


def test_masks_hide_as_many_bands_and_frames_as_the_rules_allow() -> None:
    masks = features.Masks(frequency_count=2, frequency_max=20, time_count=10, time_max=0.03)
    rng = np.random.default_rng(0)
    drawn = np.stack([masks.draw(rng, 400, 80) for _ in range(500)])
    start, width = drawn[..., 0], drawn[..., 1]
    assert drawn.shape == (500, 12, 2)
    assert set(width[:, :2].flat) == set(range(21)) and set(width[:, 2:].flat) == set(range(13))
    assert ((start + width)[:, :2] <= 80).all() and ((start + width)[:, 2:] <= 400).all()
    ones = torch.ones(500, 80, 400)
    hidden = features.mask(ones, torch.from_numpy(drawn), 2) == 0
    for row in range(0, 500, 50):
        expected = np.zeros((80, 400), bool)
        for begin, size in drawn[row, :2]:
            expected[begin : begin + size] = True
        for begin, size in drawn[row, 2:]:
            expected[:, begin : begin + size] = True
        assert np.array_equal(hidden[row].numpy(), expected)


@pytest.mark.parametrize("percent", [85, 100, 115])
def test_speed_changes_duration_and_pitch(percent: int) -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    faster = features.change_speed(tone, percent)
    assert len(faster) == pytest.approx(16000 * 100 / percent, abs=2)
    peak = np.abs(np.fft.rfft(faster)).argmax() * 16000 / len(faster)
    assert peak == pytest.approx(1000 * percent / 100, abs=2)


def test_silent_ends_are_trimmed_and_silence_is_left_alone() -> None:
    audio = np.concatenate([np.zeros(8000), noise(8000, 1), np.zeros(8000)]).astype(np.float32)
    trimmed = features.trim(audio, -60.0)
    assert 8000 <= len(trimmed) <= 8000 + 2 * 2048
    silence = np.zeros(8000, np.float32)
    assert len(features.trim(silence, -60.0)) == 8000


def test_threads_and_device_compute_the_same_features(make: MakeWorkload) -> None:
    by_threads = make("rnnt", "features_by=threads", workers=2)
    by_device = make("rnnt", "features_by=device", workers=0)
    for workload in (by_threads, by_device):
        workload.check_data()
    for one, other, _ in zip(by_threads.batches(1, 0), by_device.batches(1, 0), range(3), strict=False):
        assert one.data.keys() == other.data.keys()
        for name in one.data:
            torch.testing.assert_close(one.data[name], other.data[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("samples", [1, 159, 16001, 36508, 267200])
def test_how_long_an_utterance_is_at_another_speed_is_known_without_resampling_it(samples: int) -> None:
    audio = np.zeros(samples, np.float32)
    for percent in range(85, 116):
        assert len(features.change_speed(audio, percent)) == features.samples_at(samples, percent)


def test_the_longest_utterance_of_librispeech_gives_656_spliced_frames_at_the_lowest_speed() -> None:
    frames = features.frame_count(features.samples_at(round(16.7 * features.RATE), 85))
    assert features.spliced_count(frames, 3, 16) == 656
