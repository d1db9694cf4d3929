"""Log-mel features as the v1.1 reference computes them, and its augmentation of them.

Letters: B utterances, S samples, M mel bands, T frames of 10 ms, F features of a spliced frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from numpy.typing import NDArray
from torch import Tensor

# mlcommons/training, rnn_speech_recognition/pytorch: configs/baseline_v3-1023sp.yaml, common/data/features.py.
RATE = 16000
WINDOW, STRIDE, FFT = 320, 160, 512
"""Samples: 20 ms, 10 ms, and the length of the transform."""
DITHER, PREEMPHASIS = 1e-5, 0.97
FLOOR, EPSILON = 1e-20, 1e-5
"""Added to the energy before the logarithm, and to the deviation that is divided by."""


@dataclass(frozen=True, kw_only=True)
class Masks:
    """SpecAugment (Park et al., arXiv:1904.08779) without time warping; `time_max` is a share of the utterance
    (arXiv:1912.05533). Widths are drawn evenly from 0 to the largest, both included."""

    frequency_count: int
    frequency_max: int
    time_count: int
    time_max: float

    def draw(self, rng: np.random.Generator, frames: int, bands: int) -> NDArray[np.int64]:
        """(start, width) of each mask of one utterance, [frequency_count + time_count, 2]."""
        rows: list[tuple[int, int]] = []
        longest = round(frames * self.time_max)
        for count, largest, whole in (
            (self.frequency_count, self.frequency_max, bands),
            (self.time_count, longest, frames),
        ):
            for _ in range(count):
                width = int(rng.integers(largest + 1))
                rows.append((int(rng.integers(max(1, whole - width))), width))
        return np.array(rows, np.int64).reshape(-1, 2)


def frame_count(samples: int) -> int:
    """Frames of 10 ms in this number of samples."""
    return -(-samples // STRIDE)


def samples_at(samples: int, percent: int) -> int:
    """The number of samples after resampling to `percent` of the speed."""
    return -(-samples * 100 // percent)


def spliced_count(frames: int, factor: int, multiple: int = 1) -> int:
    """Spliced frames in this number of frames, padded to a `multiple`."""
    return -(-frames // (factor * multiple)) * multiple


def dithered(audio: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    return (audio + DITHER * rng.standard_normal(len(audio), np.float32)).astype(np.float32)


def trim(audio: NDArray[np.float32], decibels: float) -> NDArray[np.float32]:
    """Without the leading and trailing parts whose power over 2,048 samples is `decibels` below the loudest part's."""
    if len(audio) <= 2048:
        return audio
    total = np.cumsum(np.square(audio, dtype=np.float64))
    power = total[2048:] - total[:-2048]
    loud = np.flatnonzero(power > power.max() * 10 ** (decibels / 10))
    return audio[loud[0] : loud[-1] + 2048] if len(loud) else audio


def change_speed(audio: NDArray[np.float32], percent: int) -> NDArray[np.float32]:
    """Resampled to `percent` of its speed and pitch."""
    if percent == 100:
        return audio
    return _resampler(percent)(torch.from_numpy(audio)).numpy()


@cache
def _resampler(percent: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(percent, 100)


def log_mel(audio_BS: Tensor, lengths: Tensor, bands: int) -> tuple[Tensor, Tensor]:
    """Features [B, M, T] float32 of audio padded with zeros, normalised for each utterance and band to mean 0 and
    deviation 1 over its own frames, 0 behind its end; and its frames [B]. What it is batched with does not matter."""
    emphasised = torch.cat([audio_BS[:, :1], audio_BS[:, 1:] - PREEMPHASIS * audio_BS[:, :-1]], 1)
    inside = torch.arange(audio_BS.shape[1], device=audio_BS.device) < lengths[:, None]
    frames = -(-lengths // STRIDE)
    spectrum = _mel(bands, audio_BS.device)(emphasised * inside)[:, :, : frame_count(audio_BS.shape[1])]
    return normalise((spectrum + FLOOR).log(), frames), frames


@cache
def _mel(bands: int, device: torch.device) -> torchaudio.transforms.MelSpectrogram:
    """Power spectrum in slaney's mel bands, as librosa's. Silence is assumed before and after an utterance."""
    return torchaudio.transforms.MelSpectrogram(
        RATE, n_fft=FFT, win_length=WINDOW, hop_length=STRIDE, n_mels=bands, pad_mode="constant",
        window_fn=torch.hann_window, wkwargs={"periodic": False}, norm="slaney", mel_scale="slaney",
    ).to(device)  # fmt: skip


def normalise(features_BMT: Tensor, frames: Tensor) -> Tensor:
    """To mean 0 and deviation 1 over each utterance's own frames, 0 behind them."""
    inside = (torch.arange(features_BMT.shape[2], device=frames.device) < frames[:, None])[:, None]
    count = frames[:, None, None]
    mean = (features_BMT * inside).sum(2, keepdim=True) / count
    centred = (features_BMT - mean) * inside
    deviation = (centred.square().sum(2, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    return centred / (deviation + EPSILON)


def mask(features_BMT: Tensor, masks_BN2: Tensor, frequency_count: int) -> Tensor:
    """0 wherever one of an utterance's masks is."""
    for dimension, part in ((1, masks_BN2[:, :frequency_count]), (2, masks_BN2[:, frequency_count:])):
        places = torch.arange(features_BMT.shape[dimension], device=features_BMT.device)
        start, width = part[..., :1], part[..., 1:]
        hidden = ((places >= start) & (places < start + width)).any(1)
        features_BMT = features_BMT.masked_fill(hidden.unsqueeze(3 - dimension), 0.0)
    return features_BMT


def splice(features_BMT: Tensor, frames: Tensor, factor: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """`factor` frames, end to end, become one: [B, T, F], and the number of such frames [B]. T is padded to a
    `multiple`."""
    size, bands, length = features_BMT.shape
    wanted = spliced_count(length, factor, multiple)
    padded = F.pad(features_BMT, (0, wanted * factor - length))
    spliced = padded.reshape(size, bands, wanted, factor).permute(0, 2, 3, 1).reshape(size, wanted, factor * bands)
    return spliced.contiguous(), -(-frames // factor)
