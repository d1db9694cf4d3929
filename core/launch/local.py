"""`launch=local`: the ranks of one machine, in place or under torch.distributed.run. Imports without torch."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil

from core.api.config import LaunchConfig
from core.api.errors import EXIT_CODES, TimetrialError
from core.api.files import write_json
from core.api.types import Job, Launcher, PluginSpec, Ranks


class Local(Launcher):
    """One rank runs in this process, which makes it easy to debug; torch.distributed.run starts several."""

    spec = PluginSpec(interface=2, summary="the ranks on this machine, in place or by torch.distributed.run")
    Config = LaunchConfig
    config: LaunchConfig

    def ranks(self) -> Ranks:
        return Ranks(world_size=self.config.nproc, per_node=self.config.nproc)

    def launch(self, job: Job) -> int:
        return job.run_here() if job.run_here else _by_torchrun(job)


def _by_torchrun(job: Job) -> int:
    """torch.distributed.run's agent runs in this process and handles signals."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the cause is ours to print, in one line
    arguments = ["--standalone", f"--nproc-per-node={job.ranks.world_size}", "--max-restarts=0", "--no-python"]
    try:
        torchrun.run(torchrun.parse_args([*arguments, *job.command]))
        return 0
    except SignalException:
        return EXIT_CODES["stopped"]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        path = Path(job.run_dir, "errors", f"rank{rank}.json")
        if failure.exitcode < 0 and not path.exists():  # a rank that a signal killed could not say so itself
            path.parent.mkdir(exist_ok=True)
            cause = f"rank {rank} was killed by {failure.signal_name()}"
            killed = TimetrialError(f"{cause}; the same command resumes from the last checkpoint", rank=rank)
            write_json(path, {**killed.as_dict(), "kind": "killed", "time": 0.0})  # it came first
        return EXIT_CODES["failed"]
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()
