"""Time of an evaluation's two parts that are not the network: suppression of detections, and encoding of masks.

    python plugins/opts/static_detection/bench/evaluation.py [--rounds 7]      without and with the opt, interleaved

Made-up detections of COCO's size: 1,000 regions around 20 objects of an image of 800 x 1,088 pixels, 80 classes, of
which an object's regions score two; and 100 smooth masks in boxes of 20 to 300 pixels of an image of 480 x 640. Each
number is a median over calls of one process, of its time on the CPU, since cores may be shared; a round is one process
of each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from core.api.statistics import race, ratios, spread, table

sys.path.insert(0, str(Path(__file__).parent))
from step import instead_of_the_loop, report_of

CALLS = 9
IMAGES, REGIONS, OBJECTS, CLASSES, DETECTIONS = 2, 1000, 20, 80, 100


def regions() -> tuple[Any, Any, Any]:
    """Scores [B, P, K], boxes [B, P, K, 4] and which are real [B, P]."""
    import torch

    generator = torch.Generator().manual_seed(1)
    width_height = torch.tensor([1088.0, 800.0])
    middle = torch.rand(IMAGES, OBJECTS, 2, generator=generator) * width_height
    side = 30 + torch.rand(IMAGES, OBJECTS, 2, generator=generator) * 250
    of = torch.randint(OBJECTS, (IMAGES, REGIONS, 1), generator=generator).expand(-1, -1, 2)
    shift = torch.randn(IMAGES, REGIONS, 2, generator=generator) * 0.15 * side.gather(1, of)
    low = middle.gather(1, of) + shift - side.gather(1, of) / 2
    boxes = torch.cat([low, low + side.gather(1, of)], dim=-1).clamp(min=0)
    scores = torch.full((IMAGES, REGIONS, CLASSES + 1), 1e-4)
    likely = torch.rand(IMAGES, REGIONS, 2, generator=generator) * 0.5
    classes = of % CLASSES + torch.tensor([1, 2])
    scores.scatter_(2, classes, likely)
    every_class = boxes[:, :, None].expand(-1, -1, CLASSES + 1, -1)
    return scores, every_class, torch.ones(IMAGES, REGIONS, dtype=torch.bool)


def masks() -> tuple[Any, Any, int, int]:
    """Mask probabilities [D, 28, 28], boxes [D, 4], and the image's height and width."""
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator().manual_seed(2)
    rough = torch.randn(DETECTIONS, 1, 5, 5, generator=generator) * 4
    side = 20 + torch.rand(DETECTIONS, 2, generator=generator) * 280
    low = torch.rand(DETECTIONS, 2, generator=generator) * (torch.tensor([640.0, 480.0]) - side)
    boxes = torch.cat([low, low + side], dim=-1)
    return interpolate(rough, 28, mode="bicubic")[:, 0].sigmoid(), boxes, 480, 640


def milliseconds(function: Callable[..., Any], *arguments: Any) -> float:
    function(*arguments)
    seconds: list[float] = []
    for _ in range(CALLS):
        started = time.process_time()
        function(*arguments)
        seconds.append(time.process_time() - started)
    return median(seconds) * 1e3


def measure(opts: str) -> dict[str, float]:
    report: dict[str, float] = {}

    def train(ctx: Any, *_: Any) -> str:
        suppressed = ctx.model.parts.detections
        report["suppression"] = milliseconds(suppressed, *regions(), DETECTIONS, 0.05, 0.5) / IMAGES
        report["masks"] = milliseconds(ctx.workload.masks, *masks())
        return "throughput"

    code = instead_of_the_loop(["workload=maskrcnn", "data=synthetic", f"opt=[{opts}]"], train)
    if not report:
        raise SystemExit(code)
    return report


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    rounds = int(sys.argv[2]) if sys.argv[1:2] == ["--rounds"] else 7
    found = race({opts: partial(report_of, __file__, "--one", opts) for opts in ("", "static_detection")}, rounds)
    rows: list[list[object]] = []
    for part in ("suppression", "masks"):
        old, new = ([run[part] for run in runs] for runs in found.values())
        gains = spread(ratios(old, new))
        rows.append([part, f"{spread(old):.1f}", f"{spread(new):.1f}", f"{gains:.2f}", rounds])
    columns = ["part", "baseline, CPU ms an image: median (least to most)", "static_detection", "speed-up", "n"]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
