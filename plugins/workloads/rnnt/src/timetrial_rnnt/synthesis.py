"""Digit strings spoken by espeak-ng: `python -m timetrial_rnnt.synthesis FILE`, a separate process.

The library (GPL-3, in the wheel `espeakng-loader`) is loaded by this process alone. Its noise is seeded for each
utterance; but some voices leave traces in the next one, so all is spoken by one process, in one order.

FILE becomes an .npz: `rate` in Hz; `audio` [samples] int16, all utterances end to end; `ends` [utterances] int64, the
sample after each one's last; `held_out` [utterances] bool; `transcripts` and `voices` [utterances] str.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import espeakng_loader
import numpy as np
from numpy.typing import NDArray

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_PER_VOICE, HELD_OUT_PER_VOICE = 20, 30
DIGITS_PER_UTTERANCE = (2, 5)
WORDS_PER_MINUTE = (140, 200)
PITCH = (35, 65)
"""espeak-ng's scale of 0 to 100; 50 is the voice's own."""
HOLD_OUT_EVERY = 4
"""Of the voices that have no siblings, such as steph2 and steph3, in alphabetical order."""

# Constants of speak_lib.h.
_SYNCHRONOUS, _UTF8 = 2, 1
_RATE, _PITCH = 1, 3

Speak = Callable[[str, str, int, int, int], NDArray[np.int16]]


def main() -> int:
    """The command. Prints "done of all" now and then, for whoever started it."""
    speak, rate = load()
    rng = np.random.default_rng(0)
    plan = [
        (voice, held_out)
        for voice, held_out in voices()
        for _ in range(HELD_OUT_PER_VOICE if held_out else TRAIN_PER_VOICE)
    ]
    audio: list[NDArray[np.int16]] = []
    transcripts: list[str] = []
    for number, (voice, _) in enumerate(plan, 1):
        length = rng.integers(DIGITS_PER_UTTERANCE[0], DIGITS_PER_UTTERANCE[1] + 1)
        text = " ".join(DIGITS[digit] for digit in rng.integers(10, size=length))
        speed, pitch = (int(rng.integers(low, high + 1)) for low, high in (WORDS_PER_MINUTE, PITCH))
        audio.append(speak(voice, text, speed, pitch, number))
        transcripts.append(text)
        if number % 100 == 0 or number == len(plan):
            print(f"{number:,} of {len(plan):,}", flush=True)
    with Path(sys.argv[1]).open("wb") as file:
        np.savez(
            file,
            rate=np.array(rate),
            audio=np.concatenate(audio),
            ends=np.cumsum([len(a) for a in audio]),
            held_out=np.array([held_out for _, held_out in plan]),
            transcripts=np.array(transcripts),
            voices=np.array([voice for voice, _ in plan]),
        )
    return 0


def voices() -> list[tuple[str, bool]]:
    """espeak-ng's voice variants, each with whether it is held out."""
    names = sorted(path.name for path in (Path(espeakng_loader.get_data_path()) / "voices" / "!v").iterdir())
    siblings = Counter(name.lower().rstrip("0123456789") for name in names)
    alone = [name for name in names if siblings[name.lower().rstrip("0123456789")] == 1]
    held_out = set(alone[HOLD_OUT_EVERY // 2 :: HOLD_OUT_EVERY])
    return [(name, name in held_out) for name in names]


def load() -> tuple[Speak, int]:
    """A function `(voice, text, words a minute, pitch, seed) -> samples`, and its sample rate in Hz."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate < 0:
        raise OSError("espeak-ng cannot be initialised")
    chunks: list[NDArray[np.int16]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples: ctypes._Pointer[ctypes.c_short], count: int, _: int) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)

    def speak(voice: str, text: str, words_per_minute: int, pitch: int, seed: int) -> NDArray[np.int16]:
        chunks.clear()
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))  # else it is the time of day
        if library.espeak_SetVoiceByName(f"en+{voice}".encode()):
            raise OSError(f"espeak-ng has no voice {voice}")
        library.espeak_SetParameter(_RATE, words_per_minute, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        encoded = text.encode()
        library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
        return np.concatenate(chunks)

    speak.keep_alive = collect  # pyright: ignore[reportFunctionMemberAccess]  # the library calls it
    return speak, rate


if __name__ == "__main__":
    sys.exit(main())
