"""What every workload must show."""

from pathlib import Path

import safetensors.torch
import torch

from core.testing.suites import WORKLOAD_CARD, PluginSuite, WorkloadSuite

SMALL = ("encoder_hidden=32", "predictor_hidden=16", "joint_hidden=24", "global_batch_size=8")


def averages(run_dir: Path) -> dict[str, torch.Tensor]:
    """The averaged weights in the newest checkpoint."""
    saved = safetensors.torch.load_file(max((run_dir / "checkpoints").glob("step_*")) / "rank0.safetensors")
    return {name: tensor for name, tensor in saved.items() if "/workload/average/" in name}


class TestRnnt(WorkloadSuite):
    name = "rnnt"
    overrides = tuple(f"workload.{setting}" for setting in SMALL)
    steps = 6

    def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(self, tmp_path: Path) -> None:
        super().test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path)
        whole, resumed = averages(self.run().run_dir), averages(tmp_path / "run")
        assert len(whole) == len(self.run().parameters) and whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        # Six steps on, the average is neither the first weights nor the last.
        last = {tuple(tensor.shape): tensor for tensor in self.run().parameters.values()}
        assert not any(torch.equal(tensor, last[tuple(tensor.shape)]) for tensor in whole.values())


class TestRnntMLPerf(PluginSuite):
    kind = "workload"
    name = "rnnt_mlperf"
    card_headings = WORKLOAD_CARD
