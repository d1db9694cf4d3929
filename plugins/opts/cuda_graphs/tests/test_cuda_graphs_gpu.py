"""On a GPU: graphs change no bit of what the same kernels compute eagerly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.testing.cli import run_cli

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WORKLOADS = {
    "toy": ("workload=toy", "workload.dropout=0.3", "workload.examples=232"),  # its last batch is smaller
    "resnet": ("workload=resnet",),
}


@pytest.mark.parametrize("backend", [("backend=single",), ("backend=nccl", "backend.ddp=always")])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_losses_and_parameters_have_the_bits_of_the_eager_run(
    workload: str, backend: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = (*WORKLOADS[workload], *backend, "stop.steps=40")
    eager = run_cli(*arguments, "+opt=fused_optimizer", run_dir=tmp_path / "eager").expect(4)
    graphs = run_cli(*arguments, "+opt=[cuda_graphs,fused_optimizer]", run_dir=tmp_path / "graphs").expect(4)
    assert graphs.losses == eager.losses
    assert graphs.result["parameters_sha256"] == eager.result["parameters_sha256"]
    assert graphs.evidence["cuda_graphs"]["active"]


def test_a_recording_replays_new_random_numbers() -> None:
    from timetrial_cuda_graphs.cuda import CudaCapture

    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.manual_seed(5)
        eager = [torch.rand(4, device="cuda") for _ in range(3)]
        torch.cuda.manual_seed(5)
        replay, drawn = CudaCapture()(lambda: torch.rand(4, device="cuda"))
        for expected in eager:
            replay()
            assert torch.equal(drawn, expected)


def test_a_failed_recording_names_its_cause_and_leaves_the_stream_usable() -> None:
    from core.errors import UsageError
    from timetrial_cuda_graphs.cuda import CudaCapture, refusing

    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.ones(1, device="cuda")
        with pytest.raises(UsageError, match="the training step cannot be captured"):
            refusing(CudaCapture(), "the training step", "leave out 'cuda_graphs'")(x.item)
        assert (x + 1).item() == 2.0
