"""Which NVIDIA GPUs this process may use, asked of the driver's management library and without torch."""

from __future__ import annotations

import os
from importlib import metadata

from core.api.types import Devices

_REMEDY = "use backend=gloo (CPU) or backend=auto"


def probe() -> Devices:
    """The visible GPUs, one rank each, or the reason why there are none."""
    problem, count = "", 0
    try:
        uuids = _uuids()
    except LookupError:
        problem = f"no NVIDIA GPU or driver was found; {_REMEDY}"
    else:
        count = visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if count == 0:
            problem = f"CUDA_VISIBLE_DEVICES hides all of its {len(uuids)} GPUs: unset it, or {_REMEDY}"
        elif metadata.version("torch").endswith("+cpu"):
            problem = f"the installed torch is a build for CPUs: install a build for CUDA, or {_REMEDY}"
    return Devices(provides=frozenset({"cuda", "process_group"}), count=count, problem=problem)


def _uuids() -> list[str]:
    """UUIDs of the machine's GPUs in index order. LookupError where there is no GPU or no driver."""
    try:
        import pynvml
    except ImportError as error:
        raise LookupError(str(error)) from error
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise LookupError(str(error)) from error
    if not uuids:
        raise LookupError("the driver lists no GPU")
    return uuids


def visible(uuids: list[str], selection: str | None) -> int:
    """How many GPUs CUDA_VISIBLE_DEVICES (`selection`) leaves of `uuids`.

    As the CUDA programming guide says ("CUDA Environment Variables"): entries are indices or beginnings of UUIDs, and
    the first invalid one hides itself and all after it. A process can use one MIG instance only. Repeated entries
    select nothing.

    >>> visible(["GPU-aa", "GPU-bb"], "1,GPU-aa"), visible(["GPU-aa", "GPU-bb"], "0,-1,1"), visible(["GPU-aa"], "")
    (2, 1, 0)
    """
    if selection is None:
        return len(uuids)
    chosen: list[int] = []
    for entry in (part.strip() for part in selection.split(",")):
        if entry.startswith("MIG-"):
            return 1 if not chosen else len(chosen)
        if entry.isdecimal():
            matches = [int(entry)] if int(entry) < len(uuids) else []
        else:
            matches = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        if len(matches) != 1:
            break
        chosen += matches
    return len(chosen) if len(set(chosen)) == len(chosen) else 0
