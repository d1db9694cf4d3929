"""Times of the parts of `workload=rnnt` beside the loss: features by threads or on the device, decoding in batches or
one by one. `python plugins/workloads/rnnt/bench/bench_speech.py RUN [rounds]`, where RUN is the folder of a finished
run of `workload=rnnt`, whose model decodes. The variants take turns; prints median (least to most).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from core.api.statistics import race, spread
from core.testing.contexts import lone_workload
from timetrial_rnnt.workload import RnntWorkload


def workload(*overrides: str) -> RnntWorkload:
    """`workload=rnnt` on this process's best device, without other threads."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    built = lone_workload(Path(), "rnnt", *overrides, device=device)
    built.check_data()
    return built


def trained(of: RnntWorkload, run: Path) -> torch.nn.Module:
    """The model at the end of a run."""
    saved = safetensors.torch.load_file(max((run / "checkpoints").glob("step_*")) / "shared.safetensors")
    model = of.build_model()
    prefix = "shared/model/"
    model.load_state_dict({k.removeprefix(prefix): t for k, t in saved.items() if k.startswith(prefix)})
    return model.to(of.ctx.device).eval()


def compare(title: str, unit: str, rounds: int, variants: dict[str, Callable[[], int]]) -> None:
    """Each variant does its work and returns how many utterances that was."""

    def utterance_ms(work: Callable[[], int]) -> float:
        start = time.perf_counter()
        utterances = work()
        return 1000 * (time.perf_counter() - start) / utterances

    times = race({name: partial(utterance_ms, work) for name, work in variants.items()}, rounds, warmup=1)
    print(f"{title}, {unit}, n = {rounds}:")
    for name, found in times.items():
        print(f"  {name:24} {spread(found):.2f}")


def main() -> None:
    run, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    ways = {way: workload(f"features_by={way}") for way in ("threads", "device")}

    def read(of: RnntWorkload) -> int:
        return sum(batch.samples for batch in itertools.islice(of.batches(1, 0), 6))

    compare(
        "reading, augmentation and features", "ms an utterance, one thread", rounds,
        {way: (lambda of=of: read(of)) for way, of in ways.items()},
    )  # fmt: skip
    of = ways["device"]
    model, some = trained(of, run), np.arange(64)
    batch = next(of.reader.evaluation([some], 0))
    singles = list(of.reader.evaluation([some[i : i + 1] for i in range(64)], 0))
    texts: dict[str, list[str]] = {}

    @torch.no_grad()
    def decode(name: str, data: list[dict[str, torch.Tensor]]) -> int:
        texts[name] = [text for part in data for text in of.texts(model(part))]
        return len(some)

    variants = {
        "64 utterances together": lambda: decode("together", [batch]),
        "one by one": lambda: decode("alone", singles),
    }
    compare("encoding and greedy decoding", "ms an utterance", rounds, variants)
    print(f"  the same text: {texts['together'] == texts['alone']}; the first one: {texts['together'][0]!r}")


if __name__ == "__main__":
    main()
