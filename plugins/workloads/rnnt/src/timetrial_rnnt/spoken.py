"""The embedded data: digit strings in espeak-ng's voices, of which some are held out."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray

from core.api.errors import DataError
from core.api.files import sha256
from core.api.progress import Progress
from timetrial_rnnt import synthesis
from timetrial_rnnt.features import RATE
from timetrial_rnnt.text import Letters, Tokens

if TYPE_CHECKING:
    from core.api.types import RunContext
    from timetrial_rnnt.config import RnntConfig


class SpokenDigits:
    """All of it in memory: 40 minutes of audio. Utterances are numbered, those of each part from 0."""

    def __init__(self, config: RnntConfig, ctx: RunContext) -> None:
        self.ctx = ctx
        self.tokens: Tokens = Letters()
        self.train_samples = self.eval_samples = 0

    def check(self) -> None:
        """Speaks it, where this user's cache folder has it not yet, and reads it."""
        path = cached()
        with np.load(path) as file:
            audio, ends, held_out = file["audio"], file["ends"], file["held_out"]
            transcripts = [str(text) for text in file["transcripts"]]
        self.ctx.figures["audio_sha256"] = hashlib.sha256(audio.tobytes()).hexdigest()
        starts = np.concatenate([[0], ends[:-1]])
        self._audio = {"train": list[NDArray[np.int16]](), "eval": list[NDArray[np.int16]]()}
        self._texts = {"train": list[str](), "eval": list[str]()}
        for number, text in enumerate(transcripts):
            part = "eval" if held_out[number] else "train"
            self._audio[part].append(audio[starts[number] : ends[number]])
            self._texts[part].append(text)
        self.train_samples, self.eval_samples = len(self._texts["train"]), len(self._texts["eval"])

    def durations(self, part: str) -> NDArray[np.float64]:
        """Of all utterances, in seconds."""
        return np.array([len(audio) / RATE for audio in self._audio[part]])

    def audio(self, part: str, number: int) -> NDArray[np.float32]:
        """16 kHz, between -1 and 1."""
        return self._audio[part][number].astype(np.float32) / np.float32(32768)

    def transcript(self, part: str, number: int) -> str:
        return self._texts[part][number]


def cached() -> Path:
    """The file in this user's cache folder, spoken first where it is missing or damaged. Several processes may ask."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timetrial" / "rnnt"
    path = folder / f"digits-{_key()}.npz"
    known = path.with_suffix(".sha256")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (path.exists() and known.exists() and known.read_text() == sha256(path)):
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    made = Path(work) / path.name
                    _synthesise(made)
                    known.write_text(sha256(made))
                    made.replace(path)
    except OSError as error:
        problem = f"cannot keep the spoken digits in {folder}: {error.strerror or error}"
        raise DataError(f"{problem}; set XDG_CACHE_HOME to a folder that can be written") from None
    return path


def _key() -> str:
    """What the audio depends on: the synthesis's code and the library's version."""
    version = importlib.metadata.version("espeakng-loader").encode()
    return hashlib.sha256(Path(synthesis.__file__).read_bytes() + version).hexdigest()[:16]


def _synthesise(path: Path) -> None:
    """Starts the synthesis, and lowers its sample rate."""
    raw = path.with_suffix(".raw.npz")
    command = [sys.executable, "-m", "timetrial_rnnt.synthesis", str(raw)]
    with (
        closing(Progress()) as progress,
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        line = ""
        for line in process.stdout:
            progress.update(f"timetrial: speaking digits: {line.strip()}")
        if process.wait():
            errors.seek(0)
            reason = (errors.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            raise DataError(f"espeak-ng cannot speak the digits: {reason}; reinstall the package espeakng-loader")
        progress.print(f"timetrial: speaking digits: {line.strip()} utterances, kept in {path.parent.parent}")
    with np.load(raw) as file:
        spoken = {name: file[name] for name in file.files}
    parts = np.split(spoken["audio"], spoken["ends"][:-1])
    audio = [_resample(part, int(spoken["rate"])) for part in parts]
    kept = {name: spoken[name] for name in ("held_out", "transcripts", "voices")}
    with path.open("wb") as file:
        np.savez(file, audio=np.concatenate(audio), ends=np.cumsum([len(a) for a in audio]), **kept)


def _resample(samples: NDArray[np.int16], rate: int) -> NDArray[np.int16]:
    lower = torchaudio.functional.resample(torch.from_numpy(samples.astype(np.float32)), rate, RATE)
    return lower.round().clamp(-32768, 32767).to(torch.int16).numpy()
