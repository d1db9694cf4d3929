"""Evaluation, the log of a closed run, and the target."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jiwer
import mlperf_logging
import pytest
import torch
from torch import Tensor, nn

from core.api.errors import UsageError
from core.api.types import Capture
from core.testing.cli import run_cli, run_ranks
from timetrial_rnnt.workload import METRIC, RnntWorkload

MakeWorkload = Callable[..., RnntWorkload]

RULES = Path(mlperf_logging.__file__).parent / "compliance_checker" / "training_1.1.0"
SHRUNKEN = (
    "encoder_hidden=24",
    "predictor_hidden=16",
    "joint_hidden=16",
    "pre_layers=1",
    "post_layers=1",
    "max_symbols_per_frame=2",
)


def listener(model: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Inference with an untrained model that says something, and not the same everywhere. In float64, or the last bit
    could choose another symbol in one batch than in another."""
    with torch.no_grad():
        model.joint.encoder_projection.weight *= 20  # pyright: ignore
        model.joint.output.weight *= 3  # pyright: ignore
        model.joint.output.bias[model.joint.blank] += 3  # pyright: ignore
    model.double().eval()

    @torch.no_grad()
    def infer(data: dict[str, Tensor]) -> dict[str, Tensor]:
        return model({name: t.double() if t.is_floating_point() else t for name, t in data.items()})

    return infer


@pytest.mark.numbers
def test_two_ranks_find_the_word_error_rate_of_one_to_the_last_digit(make: MakeWorkload) -> None:
    def evaluate(rank: int, world: int, others: dict[int, list[float]] | None = None) -> tuple[RnntWorkload, float]:
        workload = make("rnnt", *SHRUNKEN, rank=rank, world=world)
        workload.check_data()
        workload.ctx.backend.others = others or {}  # pyright: ignore
        return workload, workload.evaluate(listener(workload.build_model()))[METRIC]

    one, alone = evaluate(0, 1)
    second, _ = evaluate(1, 2)
    _, together = evaluate(0, 2, {1: second.ctx.backend.said})  # pyright: ignore
    assert together == alone
    assert 0 < second.ctx.backend.said[1] < one.ctx.backend.said[1]  # pyright: ignore


@pytest.mark.numbers
def test_the_word_error_rate_is_jiwers_over_the_whole_set(make: MakeWorkload) -> None:
    workload = make("rnnt", *SHRUNKEN)
    workload.check_data()
    infer = listener(workload.build_model())
    heard: dict[int, str] = {}
    for numbers, data in zip(workload._eval_jobs(), workload.reader.evaluation(workload._eval_jobs(), 0), strict=True):
        heard |= dict(zip(numbers.tolist(), workload.texts(infer(data)), strict=True))
    assert sorted(heard) == list(range(workload.eval_samples))
    assert len(set(heard.values())) > 20
    said = [workload.corpus.transcript("eval", number) for number in heard]
    workload.ctx.seed_for = lambda *_: 0  # the dither as above
    assert workload.evaluate(infer)[METRIC] == pytest.approx(jiwer.wer(said, list(heard.values())), rel=1e-12)


@pytest.mark.numbers
def test_utterances_read_together_and_one_by_one_give_the_same_text(make: MakeWorkload) -> None:
    together, alone = make("rnnt", *SHRUNKEN), make("rnnt", *SHRUNKEN)
    texts: list[list[str]] = []
    for workload, jobs in ((together, [list(range(0, 450, 15))]), (alone, [[n] for n in range(0, 450, 15)])):
        workload.check_data()
        infer = listener(workload.build_model())
        arrays = [torch.tensor(job).numpy() for job in jobs]
        texts.append([text for data in workload.reader.evaluation(arrays, 0) for text in workload.texts(infer(data))])
    assert texts[0] == texts[1] and len(set(texts[0])) > 10


def test_the_closed_configuration_is_a_reference_convergence_point(make: MakeWorkload) -> None:
    workload = make("rnnt_mlperf")
    workload.ctx.config.data.source = "synthetic"
    points = Path(mlperf_logging.__file__).parent / "rcp_checker" / "training_1.1.0" / "rcps_rnnt.json"
    point = json.loads(points.read_text())["rnn_t_ref_2k"]
    logged = workload.log_values()
    names = {"model_eva_ema_factor": "model_eval_ema_factor"}  # misspelt in the package
    assert workload.global_batch_size == point["BS"]
    wanted = {names.get(name, name): value for name, value in point["Hyperparams"].items()}
    del wanted["opt_gradient_accumulation_steps"]
    assert {name: logged[name] for name in wanted} == wanted
    assert (workload.targets[0].value, workload.eval_cadence.every) == (0.058, 1)
    assert sum(p.numel() for p in workload.build_model().parameters()) == 49_006_080


def test_a_closed_run_logs_every_key_and_tensor_of_the_rules(prepared: Path, tmp_path: Path) -> None:
    settings = (*SHRUNKEN, "vocab_size=16", "global_batch_size=8")
    done = run_cli(
        "workload=rnnt_mlperf", "submission.division=closed", f"data.root={prepared}", "stop.epochs=1",
        *(f"workload.{setting}" for setting in settings), run_dir=tmp_path / "run",
    ).expect(4)  # fmt: skip
    log = (done.run_dir / "result_0.txt").read_text()
    entries = [json.loads(line.partition(":::MLLOG ")[2]) for line in log.splitlines()]
    values = {entry["key"]: entry["value"] for entry in entries}
    wanted = set()
    for rules in ("common", "closed_common", "closed_rnnt"):
        records = re.findall(r"NAME:\s+(\w+)\s+REQ:\s+(\w+(?:\(\w+\))?)", (RULES / f"{rules}.yaml").read_text())
        wanted |= {name for name, need in records if need in ("EXACTLY_ONE", "AT_LEAST_ONE")}
    assert len(wanted) > 40
    assert wanted <= values.keys()
    checks = re.findall(
        r"NAME:\s+(\w+)\s+REQ:\s+EXACTLY_ONE\s+CHECK: \" (.*) \"", (RULES / "closed_rnnt.yaml").read_text()
    )
    assert len(checks) > 15
    broken = [name for name, check in checks if not eval(check, {"v": {"value": values[name]}})]
    assert broken == ["eval_samples"]  # 2,703 utterances of dev-clean
    tensors = re.findall(r'"tensor": "([^"]+)"', log)
    assert sorted(tensors) == sorted(
        re.findall(r"'(\w+)'", re.findall(r"== sorted\((.*)\)", (RULES / "closed_rnnt.yaml").read_text())[0])
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [("vocab_size=27", "needs workload.vocab_size=28"), ("speed_min=1.2", "is above workload.speed_max=1.15")],
)
def test_settings_that_contradict_each_other_are_refused(make: MakeWorkload, override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make("rnnt", override)


@pytest.mark.convergence
def test_the_target_is_reached_and_the_log_passes_the_official_checker(
    official_checker: Callable[[Path], None], tmp_path: Path
) -> None:
    done = run_cli("workload=rnnt", run_dir=tmp_path / "run").expect(0)
    assert done.result["quality"][METRIC] <= 0.058
    official_checker(done.run_dir)


@pytest.mark.convergence
@pytest.mark.distributed
def test_two_real_ranks_find_the_word_error_rate_of_one_to_the_last_digit(tmp_path: Path) -> None:
    """Both take up a run that was ended after its third epoch, just before the evaluation."""
    trained = run_cli("workload=rnnt", "stop.steps=168", run_dir=tmp_path / "trained").expect(4)
    assert trained.result["samples"] == 3 * 1780
    again = ("workload=rnnt", "stop.epochs=3", f"resume={trained.run_dir}", "resume_changed=true")
    found = [
        run_ranks(*again, f"launch.nproc={ranks}", "backend=gloo", run_dir=tmp_path / str(ranks)).expect(4).result
        for ranks in (1, 2)
    ]
    assert [result["parameters_sha256"] for result in found] == 2 * [trained.result["parameters_sha256"]]
    assert found[0]["quality"] == found[1]["quality"] and 0.1 < found[0]["quality"][METRIC] < 1


def test_the_encoder_can_be_captured_and_there_are_few_shapes_of_its_input(make: MakeWorkload) -> None:
    workload = make("rnnt", "global_batch_size=128", "freq_masks=0", "time_masks=0")
    workload.check_data()
    assert workload.capture == Capture(parts=("encoder",))
    model = workload.build_model()
    calls: list[tuple[Any, ...]] = []
    model.get_submodule("encoder").register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    batches = [*itertools.islice(workload.batches(1, 0), 3), next(workload.example_batches())]
    for batch in batches:
        workload.loss(model, batch.data)
    assert len(calls) == len(batches)
    for args, kwargs in calls:  # what torch.cuda.make_graphed_callables takes: tensors in order
        assert len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        assert args[0].shape[1] % workload.config.pad_frames_to == 0


@pytest.mark.parametrize(("name", "size"), [("rnnt", 128), ("rnnt_mlperf", 8)])
def test_every_full_batch_has_the_shape_of_an_example(name: str, size: int, make: MakeWorkload, prepared: Path) -> None:
    settings = ("vocab_size=16",) if name == "rnnt_mlperf" else ()
    root = str(prepared) if name == "rnnt_mlperf" else None
    for rank in range(2):
        workload = make(name, f"global_batch_size={size}", *settings, rank=rank, world=2, root=root)
        workload.check_data()
        _, *examples = workload.example_batches()
        named = [batch.data["features"].shape for batch in examples]
        frames = [shape[1] for shape in named]
        assert frames == sorted(set(frames), reverse=True)
        met = [batch.data["features"].shape for batch in workload.batches(1, 0)]
        assert {shape for shape in met if shape[0] == size // 2} <= set(named)
        assert max(met, key=lambda shape: shape[1])[1] > frames[-1]


def test_on_synthetic_data_there_is_one_example(make: MakeWorkload) -> None:
    workload = make("rnnt_mlperf", "global_batch_size=4", source="synthetic")
    (batch,) = workload.example_batches()
    assert batch.data["features"].shape == (4, 560, 240)
