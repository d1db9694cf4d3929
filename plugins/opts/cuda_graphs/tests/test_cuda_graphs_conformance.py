"""What every opt must show; its runs need a GPU."""

import pytest
import torch

from core.testing.suites import OptSuite, PluginSuite


class TestCudaGraphs(OptSuite):
    name = "cuda_graphs"
    steps = 24  # 11 of them are warm-up
    test_two_ranks_give_the_result_of_one = None  # the suite's two ranks meet through gloo, which has no CUDA

    @pytest.fixture(autouse=True)
    def _needs_cuda_to_run(self, request: pytest.FixtureRequest) -> None:
        if not hasattr(PluginSuite, request.function.__name__) and not torch.cuda.is_available():
            pytest.skip("needs a GPU")
