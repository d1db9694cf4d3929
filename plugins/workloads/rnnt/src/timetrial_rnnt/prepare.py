"""From LibriSpeech to what a run reads: what `python -m core.prepare workload=rnnt_mlperf source=... out=...` does.

    source: <part>/<speaker>/<chapter>/<utterance>.flac (or .wav) and <speaker>-<chapter>.trans.txt in each chapter,
    with a line "<utterance> TRANSCRIPT" for each file

    1. each chapter       -> train/00000.pcm or eval/00000.pcm    16-bit samples at 16 kHz, utterances end to end
    2. all transcripts    -> utterances.jsonl                     {"part", "file", "id", "start", "samples", "text"}
    3. those of training  -> sentencepiece.model                  copied or trained; not where tokens are letters

Each file is written by one job in some process and depends on source, settings and seed alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from core.api.errors import DataError
from timetrial_rnnt.text import LETTERS, SentencePieces, normalise

if TYPE_CHECKING:
    from core.api.preparation import Preparation
    from timetrial_rnnt.config import RnntConfig

RATE = 16000
SUFFIXES = (".flac", ".wav")
INDEX, MODEL = "utterances.jsonl", "sentencepiece.model"
LAYOUT = "lay it out as LibriSpeech: train-clean-100/<speaker>/<chapter>/*.flac and *.trans.txt, beside {evaluation}"


def run(preparation: Preparation, config: RnntConfig) -> dict[str, int]:
    """The hook `prepare`. Returns counts of what was made."""
    if config.tokens == "letters" and config.vocab_size != len(LETTERS):
        raise DataError(f"workload.tokens=letters needs workload.vocab_size={len(LETTERS)}")
    chapters = {part: _chapters(preparation.source, part, config.eval_folder) for part in ("train", "eval")}
    jobs = [
        (f"{part}/{number:05d}.pcm", (chapter, config.max_duration if part == "train" else None))
        for part, folders in chapters.items()
        for number, chapter in enumerate(folders)
    ]
    notes = preparation.map("audio", write_chapter, jobs)
    for note in notes:
        for name, reason in note["bad"]:
            preparation.refuse(name, reason)
    rows: list[dict[str, Any]] = [
        {"part": name.partition("/")[0], "file": name, **row}
        for (name, _), note in zip(jobs, notes, strict=True)
        for row in note["utterances"]
    ]
    _require_both(rows, preparation.source, config)
    preparation.map("index", write_index, [(INDEX, (rows,))])
    tokens = len(LETTERS)
    if config.tokens == "sentencepieces":
        given = Path(config.sentencepiece_model).expanduser().absolute() if config.sentencepiece_model else None
        texts = [row["text"] for row in rows if row["part"] == "train"]
        (tokens,) = preparation.map("tokens", write_model, [(MODEL, (given, texts, config.vocab_size))])
    samples = sum(int(row["samples"]) for row in rows if row["part"] == "train")
    return {
        "training utterances": sum(row["part"] == "train" for row in rows),
        "evaluation utterances": sum(row["part"] == "eval" for row in rows),
        "training utterances left out as too long": sum(note["too_long"] for note in notes),
        "minutes of training speech": round(samples / RATE / 60),
        "tokens": tokens,
    }


def _chapters(source: Path, part: str, eval_folder: str) -> list[Path]:
    """The folders that hold audio or transcripts, in order of name."""
    tops = [source / eval_folder] if part == "eval" else sorted(source.glob("train*"))
    folders = {path.parent for top in tops for path in top.rglob("*") if path.suffix in SUFFIXES or _is_list(path)}
    if not folders:
        wanted = eval_folder if part == "eval" else "train*"
        raise DataError(f"{source} has no folder {wanted} with speech: {LAYOUT.format(evaluation=eval_folder)}")
    return sorted(folders)


def _is_list(path: Path) -> bool:
    return path.name.endswith(".trans.txt")


def _require_both(rows: list[dict[str, Any]], source: Path, config: RnntConfig) -> None:
    found = {row["part"] for row in rows}
    for part, what in (
        ("train", f"a training utterance of at most {config.max_duration:g} s"),
        ("eval", "an utterance"),
    ):
        if part not in found:
            where = config.eval_folder if part == "eval" else "train*"
            raise DataError(f"{source} does not have {what} that can be used in {where}: provide more speech")


def write_chapter(path: Path, folder: Path, max_duration: float | None) -> dict[str, Any]:
    """Job: the audio of one chapter. The note has its utterances, those that cannot be used with the reason, and how
    many are too long."""
    utterances: list[dict[str, Any]] = []
    texts, bad = _transcripts(folder)
    too_long = start = 0
    sounds = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES}
    bad += [
        (str(folder / name), "there is no audio file of this name") for name in sorted(texts.keys() - sounds.keys())
    ]
    with path.open("wb") as out:
        for name, file in sounds.items():
            try:
                text = normalise(texts.get(name, ""))
                if not text:
                    raise ValueError("it has no transcript" if name not in texts else "its transcript is empty")
                audio = read(file)
            except ValueError as error:
                bad.append((str(file), str(error)))
                continue
            if max_duration and len(audio) > max_duration * RATE:
                too_long += 1
                continue
            out.write(audio.astype("<i2").tobytes())
            utterances.append({"id": name, "start": start, "samples": len(audio), "text": text})
            start += len(audio)
    return {"utterances": utterances, "bad": bad, "too_long": too_long}


def _transcripts(folder: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Of each utterance of a chapter, and what is wrong with which file of them."""
    texts: dict[str, str] = {}
    bad: list[tuple[str, str]] = []
    for file in sorted(path for path in folder.iterdir() if _is_list(path)):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            bad.append((str(file), f"byte {error.start} is not UTF-8"))
            continue
        for line in lines:
            name, _, text = line.partition(" ")
            if name:
                texts[name] = text
    return texts, bad


def read(file: Path) -> NDArray[np.int16]:
    """The samples of a mono file at 16 kHz. ValueError where it cannot be used, with the reason."""
    try:
        with soundfile.SoundFile(file) as sound:
            if sound.samplerate != RATE:
                raise ValueError(f"its sample rate is {sound.samplerate} Hz; {RATE} Hz is expected")
            if sound.channels != 1:
                raise ValueError(f"it has {sound.channels} channels; 1 is expected")
            expected, audio = sound.frames, np.asarray(sound.read(dtype="int16"), np.int16)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        raise ValueError(f"it cannot be read as audio, or is truncated: {reason}") from None
    if len(audio) < expected or _is_cut_short(file):
        raise ValueError(f"it is truncated after sample {len(audio):,}")
    if not len(audio):
        raise ValueError("it holds no samples")
    return audio


def _is_cut_short(file: Path) -> bool:
    """Whether a wav file is smaller than its header says; the library reads what there is."""
    with file.open("rb") as content:
        head = content.read(8)
    return head[:4] == b"RIFF" and int.from_bytes(head[4:], "little") + 8 > file.stat().st_size


def write_index(path: Path, rows: Sequence[dict[str, Any]]) -> int:
    """Job: a line of JSON for each utterance."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return len(rows)


def write_model(path: Path, given: Path | None, texts: Sequence[str], size: int) -> int:
    """Job: the sentencepiece model. The note is its number of pieces."""
    if given:
        tokens = SentencePieces(given).size
        if tokens != size:
            raise DataError(f"{given} has {tokens} pieces: set workload.vocab_size={tokens}")
        shutil.copyfile(given, path)
        return tokens
    import sentencepiece

    try:
        # As the reference trains it: scripts/create_sentencepieces.sh. One thread: the result must not vary.
        with path.open("wb") as out:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=out, vocab_size=size, model_type="unigram",
                character_coverage=1.0, bos_id=-1, eos_id=-1, num_threads=1, shuffle_input_sentence=False,
                minloglevel=2,
            )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        problem = f"{len(texts)} transcripts are too few for {size} sentencepieces: {reason}"
        raise DataError(f"{problem}; set a lower workload.vocab_size") from None
    return size
