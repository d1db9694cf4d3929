"""Asking NCCL for in-network reduction, and what its debug log says.

Not run on a GPU: the files in logs/ are made up, in the formats that the library of NCCL 2.28 holds and that users of
2.18 to 2.28 have published.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.api.errors import ConflictError, NotHereError
from core.api.mesh import Mesh, arrange
from core.api.seams import GRADIENT_BUCKETS
from timetrial_sharp.in_network import log_file, plugin_library, read_log
from timetrial_sharp.nodes import declared
from timetrial_sharp.plugin import Sharp, SharpConfig

SWITCHES, NVLINK, NEITHER = (
    Path(__file__).with_name("logs").joinpath(f"{name}.log").read_text() for name in ("switches", "nvlink", "neither")
)
MIB64 = 2**26


def test_all_reduces_in_switches_are_counted_and_other_collectives_are_not() -> None:
    log = read_log(SWITCHES.splitlines())
    assert log.calls == {"TREE": 1, "COLLNET_DIRECT": 1, "COLLNET_CHAIN": 1}
    assert log.bytes == {"TREE": 4, "COLLNET_DIRECT": MIB64, "COLLNET_CHAIN": MIB64}
    assert log.in_network_share == pytest.approx(1.0, abs=1e-6)
    assert (log.registered, log.reasons) == (1, [])


def test_nvlink_sharp_is_told_from_rings_and_from_kernels_that_add_up_in_the_gpu() -> None:
    log = read_log(NVLINK.splitlines())
    assert log.calls == {"RING": 1, "NVLS": 1, "MULTIMEM": 1, "AllReduce_AGxLL_R": 1}
    assert log.in_network_share == pytest.approx((268435456 + 2097152) / (268435456 + 2097152 + 8388608 + 1024))
    assert (log.registered, log.nvls_missing) == (1, False)


def test_collnet_channels_without_an_all_reduce_that_used_them_prove_nothing_and_the_reasons_are_kept() -> None:
    log = read_log(NEITHER.splitlines())
    assert log.calls == {"RING": 1, "TREE": 1}
    assert log.in_network_share == 0.0
    assert log.nvls_missing
    assert log.reasons == [
        "NET/Plugin: Could not find: libnccl-net.so",
        "NVLS multicast support is not available on dev 0 (NVLS_NCHANNELS 0)",
        "Cannot initialize CollNet, using point-to-point network instead",
        "SHARP group create: Streaming Tree lock failed (-18)",
    ]


def test_a_log_without_a_choice_shows_nothing() -> None:
    assert read_log(["NCCL version 2.28.9+cuda13.0"]).in_network_share == 0.0


# ------------------------------------------------------------------------------------------------------- the plugin


class Alone:
    """A backend with one process, which speaks for all ranks."""

    def __init__(self, world_size: int, device: str) -> None:
        self.rank, self.world_size, self.device = 0, world_size, torch.device(device)

    def all_gather(self, values: list[float]) -> list[list[float]]:
        return [values] * self.world_size

    def broadcast(self, value: Any) -> Any:
        return value


def sharp(**settings: Any) -> Sharp:
    defaults = {"ranks_per_node": None, "chunk_mib": 2.0, "bucket_cap_mib": 64.0, "register_buffers": False}
    return Sharp(SharpConfig(**{"reduction": "auto", **defaults, **settings}))


def context(run_dir: Path, device: str = "cuda", ranks: int = 4) -> Any:
    backend = Alone(ranks, device)
    mesh = Mesh(arrange([], ranks))
    return SimpleNamespace(backend=backend, mesh=mesh, rank=0, world_size=ranks, device=backend.device, run_dir=run_dir)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_DEBUG_FILE", "NCCL_NET_PLUGIN", "HPCX_DIR", "LD_LIBRARY_PATH", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GROUP_RANK", "0")


def decide(opt: Sharp, ctx: Any) -> bool:
    opt._decide(ctx)
    return opt._in_network


def make_plugin(folder: Path, *, collnet: bool) -> Path:
    path = folder / "libnccl-net.so"
    path.write_bytes(b"\x7fELF ncclNetPlugin_v10 " + (b"ncclCollNetPlugin_v10" if collnet else b""))
    return path


def test_the_request_is_made_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = sharp().environment()
    assert request["NCCL_COLLNET_ENABLE"] == "1"
    assert (request["NCCL_DEBUG"], "TUNING" in request["NCCL_DEBUG_SUBSYS"]) == ("INFO", True)
    assert "NCCL_ALGO" not in request and "NCCL_NET_PLUGIN" not in request
    assert sharp(reduction="two_level").environment() == {}
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    library = make_plugin(tmp_path, collnet=True)
    assert sharp().environment()["NCCL_NET_PLUGIN"] == str(library)


def test_a_network_plugin_without_collnet_is_not_taken_for_sharp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert plugin_library() is None
    make_plugin(tmp_path, collnet=False)
    assert plugin_library() is None
    hpcx = tmp_path / "hpcx" / "nccl_rdma_sharp_plugin" / "lib"
    hpcx.mkdir(parents=True)
    monkeypatch.setenv("HPCX_DIR", str(tmp_path / "hpcx"))
    library = make_plugin(hpcx, collnet=True)
    assert plugin_library() == library


def test_nccl_writes_its_log_into_the_run_folder_unless_the_user_names_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert log_file(tmp_path, 0) == tmp_path / "nccl_rank0.log"
    assert log_file(tmp_path, 1) == Path("/dev/null")
    monkeypatch.setenv("NCCL_DEBUG_FILE", "/logs/nccl.%p")
    assert log_file(tmp_path, 0).name.removeprefix("nccl.").isdigit()


def test_nccl_on_one_node_relies_on_nvlink_sharp(tmp_path: Path) -> None:
    (tmp_path / "nccl_rank0.log").write_text(NVLINK)
    assert decide(sharp(), context(tmp_path))
    (tmp_path / "nccl_rank0.log").write_text(NEITHER)
    with pytest.raises(NotHereError, match="NCCL finds no NVLink SHARP there"):
        decide(sharp(), context(tmp_path))


def test_nccl_on_several_nodes_relies_on_the_plugin_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_nodes = {"ranks_per_node": 2}
    assert not decide(sharp(**two_nodes), context(tmp_path))
    assert decide(sharp(reduction="in_network", **two_nodes), context(tmp_path))
    make_plugin(tmp_path, collnet=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert decide(sharp(**two_nodes), context(tmp_path))
    assert not decide(sharp(reduction="two_level", **two_nodes), context(tmp_path))


def test_in_network_reduction_needs_nccl(tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match=r"needs NCCL: use backend=nccl, or reduction=two_level"):
        decide(sharp(reduction="in_network"), context(tmp_path, device="cpu"))


def evidence(log: str, folder: Path) -> Any:
    opt = sharp()
    opt._nodes, opt._in_network = declared(4, 4), True
    (folder / "nccl_rank0.log").write_text(log)
    return opt.verify(context(folder))


def test_evidence_names_the_algorithm_that_ran(tmp_path: Path) -> None:
    found = evidence(SWITCHES, tmp_path)
    assert found.active
    assert "in-network reduction of 100% of the bytes" in found.summary
    assert "COLLNET_CHAIN 1, COLLNET_DIRECT 1, TREE 1" in found.summary


@pytest.mark.parametrize(("log", "why"), [(NEITHER, "Cannot initialize CollNet"), ("", "NCCL gives no reason")])
def test_what_was_asked_for_and_not_used_is_missing_evidence(tmp_path: Path, log: str, why: str) -> None:
    found = evidence(log, tmp_path)
    assert not found.active
    assert found.summary.startswith("asked for in-network reduction, but not used")
    assert why in found.summary


def test_buckets_are_large_enough_for_the_switches_and_never_made_smaller(tmp_path: Path) -> None:
    opt = sharp()
    buckets = next(r for r in opt.replace(context(tmp_path)) if r.seam is GRADIENT_BUCKETS)
    plain = {"bucket_cap_mb": 25.0, "bucket_at_least_mb": 0.0}
    opt._in_network = False
    assert buckets.make(plain) == plain
    opt._in_network = True
    assert buckets.make(plain) == {"bucket_cap_mb": 25.0, "bucket_at_least_mb": 64.0}
    assert buckets.make({**plain, "bucket_at_least_mb": 100.0})["bucket_at_least_mb"] == 100.0
