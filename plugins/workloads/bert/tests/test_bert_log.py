"""The log of a closed run, and what a model without context reaches."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlperf_logging
import numpy as np

from core.testing.cli import run_cli
from timetrial_bert.workload import BertWorkload, closed_cadence

MakeWorkload = Callable[..., BertWorkload]

RULES = Path(mlperf_logging.__file__).parent / "compliance_checker" / "training_1.1.0"


def test_evaluation_cadence_is_the_references_table() -> None:
    """language_model/tensorflow/bert/README.md, "Example evaluation frequency"; its line for 8,192 (175,000) does not
    follow from its own formula, which gives 225,000."""
    sizes = (256, 1024, 1536, 2048, 3072, 4096, 8192)
    assert [closed_cadence(size) for size in sizes] == [150_000] * 4 + [175_000] * 2 + [225_000]


def test_the_closed_configuration_is_a_reference_convergence_point(make: MakeWorkload) -> None:
    workload = make("bert_mlperf")
    points = Path(mlperf_logging.__file__).parent / "rcp_checker" / "training_1.1.0" / "rcps_bert.json"
    point = json.loads(points.read_text())["bert_ref_3072"]
    logged = {**workload.log_values(), "gradient_accumulation_steps": 96}
    assert workload.global_batch_size == point["BS"]
    assert {name: logged[name] for name in point["Hyperparams"]} == point["Hyperparams"]
    assert (workload.targets[0].value, workload.eval_cadence.every) == (0.72, 175_000)


def test_a_closed_run_logs_every_key_and_tensor_of_the_rules(prepared: Path, tmp_path: Path) -> None:
    small = ("size=tiny", "vocab_size=150", "sequence_length=64", "max_predictions=12", "max_positions=64")
    more = ("masking=dynamic", "global_batch_size=16", "max_eval_samples=16", "eval.every=32", "dropout=0")
    done = run_cli(
        "workload=bert_mlperf", "submission.division=closed", f"data.root={prepared}", "stop.steps=3",
        *(f"workload.{setting}" for setting in (*small, *more)), run_dir=tmp_path / "run",
    ).expect(4)  # fmt: skip
    log = (done.run_dir / "result_0.txt").read_text()
    found = {json.loads(line.partition(":::MLLOG ")[2])["key"] for line in log.splitlines()}
    wanted = set()
    for rules in ("common", "closed_common", "closed_bert"):
        records = re.findall(r"NAME:\s+(\w+)\s+REQ:\s+(\w+(?:\(\w+\))?)", (RULES / f"{rules}.yaml").read_text())
        wanted |= {name for name, need in records if need in ("EXACTLY_ONE", "AT_LEAST_ONE")}
    assert len(wanted) > 20
    assert wanted <= found
    tensors = re.findall(r'"tensor": "([^"]+)"', log)
    closed = re.findall(r'"((?:bert|cls)/[^"]+)"', (RULES / "closed_bert.yaml").read_text())
    assert len(closed) == 398
    assert sorted(tensors) == sorted(n for n in closed if re.search(r"layer_[01]/|^(?!.*layer_)", n))


def test_an_open_run_passes_the_official_checker(tmp_path: Path) -> None:
    small = ("global_batch_size=8", "sequence_length=32", "eval.every=16")
    done = run_cli("workload=bert", "stop.steps=3", *(f"workload.{s}" for s in small), run_dir=tmp_path / "run")
    checker = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "1.1.0"]
    log = done.expect(4).run_dir / "result_0.txt"
    checked = subprocess.run(
        [*checker, "--werror", str(log)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_target_is_far_beyond_a_model_without_context(make: MakeWorkload) -> None:
    """The best such model repeats a token that is shown (8 of 10 are not) and else takes the most frequent one."""
    workload = make("bert")
    examples = workload.examples
    vocabulary = examples.vocabulary
    counts = Counter(
        token for example in examples.train(range(examples.train_samples), 1) for token in example.input_ids
    )
    for special in (vocabulary.cls, vocabulary.sep, vocabulary.mask):
        del counts[special]
    best = counts.most_common(1)[0][0]
    guessed = repeated = masked = 0
    for example in examples.evaluation(range(examples.eval_samples)):
        shown, labels = example.input_ids[example.masked_positions], example.masked_labels
        guessed += int((labels == best).sum())
        repeated += int((np.where(shown == vocabulary.mask, best, shown) == labels).sum())
        masked += len(labels)
    assert vocabulary.tokens[best] == "the"
    assert (round(guessed / masked, 3), round(repeated / masked, 3)) == (0.032, 0.127)
    assert workload.targets[0].value > 2 * repeated / masked
