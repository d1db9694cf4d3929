"""What the opt `lean_transducer` is worth: time and memory of the transducer loss, joint network included, against
torchaudio's on all logits.

    uv run python tools/bench_transducer.py
    uv run python tools/bench_transducer.py --shapes 8x200x40x1024 --lengths ragged --rounds 7
    uv run python tools/bench_transducer.py --device cuda
    uv run python tools/bench_transducer.py --shapes 8x200x40x1024 --errors      how near float32 comes to float64

A shape is utterances x frames x labels x vocabulary. Every contender is a separate process with one torch thread,
which runs forward and backward pass (down to the gradients of the encoder's and the prediction network's output, and of
the joint's weight and bias) once a round, when it is its turn; ratios are taken within a round. Figures are medians
(minimum to maximum). Weights and inputs are random, so that the alignment is as unsure as it can be: the share of the
cells that the backward pass needs is then at its largest.

Memory is that of the first full-sized run: on a CPU the process's highest resident size (VmHWM of Linux, reset before)
above its size before, with inputs made and libraries loaded by a run on a small example; on CUDA the highest allocated
memory above that before.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from core.api.errors import exit_status
from core.api.statistics import processes, race, ratios, row, spread, table

SHAPES = ("8x200x40x1024", "4x400x80x1024", "8x200x40x256", "8x100x20x128", "16x60x12x32")
"""The first four are of the sizes of LibriSpeech utterances, with vocabularies of word pieces; the last one of spelt
digits."""
SETTINGS: dict[str, dict[str, Any]] = {
    "torchaudio": {},
    "exact, every cell again": {"negligible": 0.0},
    "exact": {"negligible": 1e-9},
    "pruned": {"negligible": 1e-9, "span": 5},
    "exact, Triton recursion": {"negligible": 1e-9, "recursion": "triton"},
}
BASELINE = "torchaudio"
SMALL = (2, 5, 3, 32)
MIB = 2**20


# ------------------------------------------------------------------- one contender, in a separate process


def make_loss(contender: str) -> tuple[Callable[..., Any], Callable[[], float | None]]:
    """The loss, and the share of the cells that its backward pass has computed again."""
    if contender == BASELINE:
        from torchaudio.functional import rnnt_loss

        def plain(joint: Any, encoded: Any, predicted: Any, labels: Any, frames: Any, label_lengths: Any) -> Any:
            logits = joint.output(joint.dropout(joint.activation(encoded[:, :, None] + predicted[:, None])))
            lengths = frames.int(), label_lengths.int()
            return rnnt_loss(logits, labels.int(), *lengths, blank=joint.blank, reduction="none")

        return plain, lambda: None
    from timetrial_lean_transducer.loss import LeanLoss

    loss = LeanLoss(**SETTINGS[contender])
    return loss, lambda: loss.work.revisited / loss.work.padded


def example(contender: str, shape: tuple[int, ...], arguments: argparse.Namespace) -> tuple[Any, ...]:
    """Joint network, encoded, predicted, labels and both lengths; ragged lengths are between half and full."""
    import torch
    from torch import nn

    batch, frames, labels, vocabulary = shape
    width, device = arguments.width, arguments.device
    torch.manual_seed(0)
    joint = nn.Module()
    joint.activation, joint.dropout = nn.ReLU(), nn.Dropout(arguments.dropout)
    joint.output, joint.blank = nn.Linear(width, vocabulary), vocabulary - 1
    if contender == "pruned":
        from timetrial_lean_transducer.pruning import SimpleJoint

        joint.simple = SimpleJoint(width, vocabulary, seed=0)
    encoded, predicted = (torch.randn(batch, n, width, device=device) for n in (frames, labels + 1))
    said = torch.randint(vocabulary - 1, (batch, labels), device=device)
    share = torch.linspace(0.5, 1, batch) if arguments.lengths == "ragged" else torch.ones(batch)
    limits = ((share * n).long().to(device) for n in (frames, labels))
    return joint.to(device), encoded.requires_grad_(), predicted.requires_grad_(), said, *limits


def once(loss: Callable[..., Any], inputs: tuple[Any, ...], device: str) -> float:
    """Seconds of a forward and a backward pass."""
    import torch

    start = time.perf_counter()
    torch.autograd.grad(loss(*inputs).sum(), [inputs[1], inputs[2], *inputs[0].parameters()])
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def serve(arguments: argparse.Namespace) -> None:
    """A run for each line of stdin; answers with its seconds, and the first time with its memory."""
    import torch

    torch.set_num_threads(1)
    contender, device = arguments.serve, arguments.device
    loss, revisited = make_loss(contender)
    once(loss, example(contender, SMALL, arguments), device)  # the only one whose memory the opt's evidence measures
    inputs = example(contender, tuple(int(n) for n in arguments.shapes[0].split("x")), arguments)
    gc.collect()
    peak: int | None = None
    for _ in sys.stdin:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before, highest = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before, highest = resident("VmRSS"), lambda: resident("VmHWM")
        seconds = once(loss, inputs, device)
        peak = highest() - before if peak is None else peak
        print(json.dumps({"seconds": seconds, "peak": peak, "revisited": revisited()}), flush=True)


def errors(shape: str, contenders: list[str], arguments: argparse.Namespace) -> list[str]:
    """Markdown: the norm of each gradient's difference from float64's, relative to the gradient's."""
    import torch

    sizes = tuple(int(n) for n in shape.split("x"))

    def gradients(contender: str, dtype: torch.dtype, loss: Callable[..., Any]) -> list[torch.Tensor]:
        joint, encoded, predicted, *rest = example(contender, sizes, arguments)
        inputs = [t.detach().to(dtype).requires_grad_() for t in (encoded, predicted)]
        losses = loss(joint.to(dtype), *inputs, *rest)
        return [g.double() for g in torch.autograd.grad(losses.sum(), [*inputs, *joint.output.parameters()])]

    truth = gradients("exact", torch.float64, make_loss("exact, every cell again")[0])
    lines: list[str] = []
    for name in contenders:
        found = gradients(name, torch.float32, make_loss(name)[0])
        off = [float((mine - true).norm() / true.norm()) for mine, true in zip(found, truth, strict=True)]
        lines.append(row([shape, name, *(f"{value:.1e}" for value in off)]))
    return lines


# ------------------------------------------------------------------- the race


def compare(shape: str, contenders: list[str], arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Contender -> what it answered in each round; the first round, in which caches fill, counts memory only."""
    common = [f"--{name}={getattr(arguments, name)}" for name in ("width", "dropout", "lengths", "device")]
    command = [sys.executable, __file__, "--shapes", shape, *common]
    with processes({name: [*command, "--serve", name] for name in contenders}) as served:
        return race(served, arguments.rounds + 1, title=shape)


def rows(shape: str, answers: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown: one row a contender."""
    lines: list[str] = []
    base = answers.get(BASELINE)
    for name, found in answers.items():
        seconds, peak = [a["seconds"] for a in found[1:]], found[0]["peak"] / MIB
        again = "" if found[-1]["revisited"] is None else f"{found[-1]['revisited']:.0%}"
        faster = smaller = ""
        if base:
            gains = spread(ratios([b["seconds"] for b in base[1:]], seconds))
            faster, smaller = f"{gains:.2f}", f"{base[0]['peak'] / MIB / peak:.1f}"
        time_ms = spread([s * 1e3 for s in seconds])
        lines.append(row([shape, name, f"{time_ms:,.0f}", faster, f"{peak:,.0f}", smaller, again]))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxTxUxV")
    parser.add_argument("--contenders", nargs="+", choices=list(SETTINGS), help="all that the device can run")
    parser.add_argument("--width", type=int, default=512, help="of the joint network; 512 is MLPerf's")
    parser.add_argument("--dropout", type=float, default=0.0, help="in the joint network; MLPerf's is 0.3")
    parser.add_argument("--lengths", choices=("full", "ragged"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--errors", action="store_true", help="of the gradients of exact losses, instead of a race")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--serve", choices=list(SETTINGS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    contenders = arguments.contenders or [c for c in SETTINGS if arguments.device == "cuda" or "Triton" not in c]
    if arguments.serve:
        serve(arguments)
        return 0
    if arguments.errors:
        print(table(["(B,T,U,V)", "loss", "encoded", "predicted", "weight", "bias"]))
        for shape in arguments.shapes:
            print("\n".join(errors(shape, [c for c in contenders if c != "pruned"], arguments)), flush=True)
        return 0
    print(table(["(B,T,U,V)", "loss", "ms", "times faster", "peak MiB", "times smaller", "cells again"]))
    figures: dict[str, Any] = {}
    for shape in arguments.shapes:
        figures[shape] = compare(shape, contenders, arguments)
        print("\n".join(rows(shape, figures[shape])), flush=True)
    versions = {name: metadata.version(name) for name in ("torch", "torchaudio")} | {
        "python": platform.python_version()
    }
    setting = f"width {arguments.width}, dropout {arguments.dropout}, {arguments.lengths} lengths, {arguments.device}"
    print(f"\nn={arguments.rounds}, {setting}; {versions}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"versions": versions, "command": sys.argv, "rounds": figures}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
