"""In-network reduction by NCCL: asking for it, and reading from NCCL's debug log what ran instead of believing it.

CollNet reduces in InfiniBand switches (SHARP) through a plugin library; NVLS reduces in the NVSwitches of one node.
"""

from __future__ import annotations

import ctypes.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

REQUEST = {
    "NCCL_COLLNET_ENABLE": "1",  # off by default
    "NCCL_NVLS_ENABLE": "2",  # where there is an NVSwitch; 1 would end the run where there is none
    "NCCL_DEBUG": "INFO",
    "NCCL_DEBUG_SUBSYS": "INIT,NET,TUNING,REG",
}
"""NCCL_ALGO is left alone: forcing CollNet has crashed jobs (NVIDIA/nccl issues 653 and 1219)."""

_LIBRARY, _SYMBOL = "libnccl-net", b"ncclCollNetPlugin"

_NUMBERED = ("TREE", "RING", "COLLNET_DIRECT", "COLLNET_CHAIN", "NVLS", "NVLS_TREE", "PAT")
"""NCCL's algorithms in the order of their numbers (nccl_common.h), which older versions print instead of names."""

IN_NETWORK = frozenset({"COLLNET_DIRECT", "COLLNET_CHAIN", "NVLS", "NVLS_TREE", "MULTIMEM"})
"""MULTIMEM is our word for the kernels on symmetric memory that let the NVSwitch reduce."""

_SPELLINGS = {"COLLNETDIRECT": "COLLNET_DIRECT", "COLLNETCHAIN": "COLLNET_CHAIN", "NVLSTREE": "NVLS_TREE"}

_CHOICE = re.compile(r"NCCL INFO (?:AllReduce: )?(?P<bytes>\d+) Bytes -> Algo (?P<algorithm>\w+) proto")
_SYMMETRIC = re.compile(r"NCCL INFO AllReduce \[Symmetric\]: (?P<bytes>\d+) Bytes -> Kernel (?P<kernel>\w+)")
_REGISTERED = re.compile(r"successfully registered NVLS|COLLNET register userbuff")
_NOT_REGISTERED = re.compile(r"failed to NVLS register|COLLNET failed to register userbuff")

NO_NVLS = re.compile(r"NVLS multicast support is not available|Proceeding without NVLS support")
_REASONS = re.compile(
    NO_NVLS.pattern + r"|Cannot initialize CollNet|CollNet is not supported or fails to initialize"
    r"|less than CollNet node threshold|NET/Plugin ?: (?:No plugin found|Could not find)"
    r"|SHARP.*(?:fallback|lock failed|not supported)",
)
"""What NCCL and its SHARP plugin print where they do without (wordings of 2.18 to 2.28)."""


@dataclass
class NcclLog:
    """What NCCL's debug log says about the all-reduces of one rank. Only rank 0 prints its choices.

    The line with the number of "collnet channels" is left out: several versions repeat the ordinary channels there.
    """

    calls: dict[str, int] = field(default_factory=dict[str, int])
    """All-reduces by algorithm. A captured graph counts once, however often it is replayed."""
    bytes: dict[str, int] = field(default_factory=dict[str, int])
    registered: int = 0
    """Registrations of our buffers that NCCL reports; and those that failed."""
    not_registered: int = 0
    reasons: list[str] = field(default_factory=list[str])
    """Lines that say why something was not used."""

    @property
    def in_network_share(self) -> float:
        """Of the bytes that were all-reduced, how many the network summed."""
        total = sum(self.bytes.values())
        return sum(n for name, n in self.bytes.items() if name in IN_NETWORK) / total if total else 0.0

    @property
    def nvls_missing(self) -> bool:
        return any(NO_NVLS.search(reason) for reason in self.reasons)


def read_log(lines: Iterable[str]) -> NcclLog:
    """Parses lines such as `host:pid:tid [0] NCCL INFO AllReduce: 4194304 Bytes -> Algo NVLS proto SIMPLE ...`."""
    log = NcclLog()
    for line in lines:
        if choice := _CHOICE.search(line):
            _add(log, _name(choice["algorithm"]), int(choice["bytes"]))
        elif choice := _SYMMETRIC.search(line):
            _add(log, "MULTIMEM" if "LDMC" in choice["kernel"] else choice["kernel"], int(choice["bytes"]))
        elif _REGISTERED.search(line):
            log.registered += 1
        elif _NOT_REGISTERED.search(line):
            log.not_registered += 1
        elif _REASONS.search(line):
            reason = re.sub(r"^.*NCCL (?:INFO|WARN) ", "", line).strip()
            if reason not in log.reasons:
                log.reasons.append(reason)
    return log


def _add(log: NcclLog, algorithm: str, size: int) -> None:
    log.calls[algorithm] = log.calls.get(algorithm, 0) + 1
    log.bytes[algorithm] = log.bytes.get(algorithm, 0) + size


def _name(algorithm: str) -> str:
    if algorithm.isdigit():
        number = int(algorithm)
        return _NUMBERED[number] if number < len(_NUMBERED) else f"ALGORITHM_{number}"
    return _SPELLINGS.get(algorithm.upper(), algorithm.upper())


def log_file(run_dir: Path, rank: int) -> Path:
    """Where NCCL is told to write, unless the user has said so: in the run folder for rank 0, nowhere for others."""
    given = os.environ.get("NCCL_DEBUG_FILE")
    if given is None:
        return run_dir / "nccl_rank0.log" if rank == 0 else Path(os.devnull)
    return Path(given.replace("%h", os.uname().nodename).replace("%p", str(os.getpid())))


def plugin_library() -> Path | None:
    """The network plugin that NCCL would load, if it can do CollNet.

    NCCL_NET_PLUGIN names it (a path, a library's name or the end of one); its default is libnccl-net.so. It is looked
    for where the loader would, and in HPC-X ($HPCX_DIR), which brings NVIDIA's SHARP plugin.
    """
    wanted = os.environ.get("NCCL_NET_PLUGIN", "")
    names = [wanted, f"{_LIBRARY}-{wanted}.so"] if wanted else [f"{_LIBRARY}.so"]
    folders = [Path(f) for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    if "HPCX_DIR" in os.environ:
        folders.append(Path(os.environ["HPCX_DIR"], "nccl_rdma_sharp_plugin", "lib"))
    found = [folder / name for folder in folders for name in names]  # an absolute name is kept
    if not wanted and (listed := ctypes.util.find_library("nccl-net")):
        found.append(Path(listed))
    return next((path for path in found if path.is_file() and _SYMBOL in path.read_bytes()), None)
