"""On a GPU: features, text and training are those of the CPU, and the encoder is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from core.testing.cli import run_cli
from timetrial_rnnt.layers import Sizes
from timetrial_rnnt.model import Transducer, initialise
from timetrial_rnnt.workload import RnntWorkload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MakeWorkload = Callable[..., RnntWorkload]

GPU = "cuda"
ON_GPU = ("backend=single", "backend.device=cuda")
SHRUNKEN = ("vocab_size=16", "global_batch_size=8", "encoder_hidden=24", "predictor_hidden=16", "joint_hidden=16")
WITHOUT_DROPOUT = ("encoder_dropout=0", "predictor_dropout=0", "joint_dropout=0")
"""A GPU draws other masks."""


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """cuDNN's LSTM rounds its inputs to TF32 by default, which may decide between two labels."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def test_its_features_are_those_of_the_cpu(make: MakeWorkload, prepared: Path) -> None:
    batches = []
    for device in ("cpu", GPU):
        workload = make("rnnt_mlperf", *SHRUNKEN, root=str(prepared), device=device)
        workload.check_data()
        batches.append(next(iter(workload.batches(1, 0))).data)
    assert batches[1]["features"].device.type == GPU
    for name, expected in batches[0].items():
        torch.testing.assert_close(batches[1][name].cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("without_tf32")
def test_its_text_is_that_of_the_cpu() -> None:
    sizes = Sizes(
        features=6, classes=7, encoder_hidden=10, pre_layers=1, stack_time=2, post_layers=1, predictor_hidden=9,
        predictor_layers=2, joint_hidden=8, encoder_dropout=0.0, predictor_dropout=0.0, joint_dropout=0.0,
    )  # fmt: skip
    model = Transducer(sizes, lambda *_: torch.zeros(()), max_symbols=300, max_per_frame=4).eval()
    initialise(model, 1.0, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.joint.output.weight *= 8  # its classes are far apart
        features = 3 * torch.randn(9, 60, sizes.features, generator=generator)
        data = {"features": features, "feature_lengths": torch.randint(20, 60, (9,), generator=generator)}
        expected = model(data)
        mine = model.to(GPU)({name: tensor.to(GPU) for name, tensor in data.items()})
    assert expected["counts"].sum() > 50
    assert all(torch.equal(mine[name].cpu(), expected[name]) for name in expected)


def test_prepared_speech_is_trained_on_and_evaluated_with_the_losses_of_the_cpu(prepared: Path, tmp_path: Path) -> None:
    settings = (f"workload.{setting}" for setting in (*SHRUNKEN, *WITHOUT_DROPOUT, "max_symbols_per_frame=2"))
    arguments = ("workload=rnnt_mlperf", f"data.root={prepared}", "stop.epochs=1", *settings)
    mine = run_cli(*arguments, *ON_GPU, run_dir=tmp_path / "gpu").expect(4)
    expected = run_cli(*arguments, "backend=single", "backend.device=cpu", run_dir=tmp_path / "cpu").expect(4)
    torch.testing.assert_close(torch.tensor(mine.losses), torch.tensor(expected.losses), rtol=1e-2, atol=0)


def test_its_encoder_is_a_graph_where_cuda_graphs_asks_for_it(tmp_path: Path) -> None:
    arguments = ("workload=rnnt", "data=synthetic", "stop.steps=5", *ON_GPU)
    eager = run_cli(*arguments, run_dir=tmp_path / "eager").expect(0)
    graphed = run_cli(*arguments, "+opt=cuda_graphs", run_dir=tmp_path / "graphed").expect(0)
    assert graphed.evidence["cuda_graphs"]["active"]
    torch.testing.assert_close(torch.tensor(graphed.losses), torch.tensor(eager.losses), rtol=1e-2, atol=0)


def test_its_encoder_is_a_graph_for_every_full_batch_of_an_epoch(tmp_path: Path) -> None:
    arguments = ("workload=rnnt", "stop.epochs=1", *ON_GPU)
    eager = run_cli(*arguments, run_dir=tmp_path / "eager").expect(4)
    graphed = run_cli(*arguments, "+opt=cuda_graphs", run_dir=tmp_path / "graphed").expect(4)
    figures = graphed.evidence["cuda_graphs"]["figures"]["encoder"]
    assert list(figures["eager_calls"].values()) == [1]  # the last batch
    assert sum(count > 0 for count in figures["replays"].values()) >= 5
    torch.testing.assert_close(torch.tensor(graphed.losses), torch.tensor(eager.losses), rtol=1e-2, atol=0)
