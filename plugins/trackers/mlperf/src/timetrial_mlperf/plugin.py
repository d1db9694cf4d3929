"""The tracker `mlperf`: what the run does, in the words of the v1.1 rules."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.api.errors import TimetrialError
from core.api.hooks import hookimpl
from core.api.types import Plugin, PluginSpec, Position, RunContext

if TYPE_CHECKING:
    from mlperf_logging.mllog.mllog import MLLogger

LOG = "result_0.txt"


@dataclass(kw_only=True)
class MlperfConfig:
    """It has no settings: `submission` in the root configuration is also in system.json."""


class MlperfLog(Plugin):
    """Writes result_0.txt on rank 0. A resumed run continues the log as it was at its checkpoint."""

    spec = PluginSpec(interface=2, summary="the official MLPerf log, for MLCommons' checkers")
    Config = MlperfConfig

    _mllog: MLLogger | None = None
    _length: int | None = None
    """Of the log that is continued, in bytes."""
    _continues = False

    def state_dict(self) -> dict[str, Any]:
        return {"length": self._file.tell()} if self._mllog else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._length = state.get("length")

    @hookimpl
    def on_run(self, ctx: RunContext, event: Literal["init", "start", "stop", "failed"], status: str) -> None:
        if ctx.rank > 0 or event == "failed":  # the rules know no line for a run that failed
            return
        from mlperf_logging.mllog import constants

        if event == "init":
            self._mllog = self._open(ctx.run_dir / LOG)
            if not self._continues:
                self._mllog.event(constants.CACHE_CLEAR, False)  # an ordinary user cannot flush the system's caches
                self._mllog.start(constants.INIT_START)
        elif event == "start" and not self._continues:
            self._write_header(ctx)
        elif event == "stop" and self._mllog:
            self._mllog.end(constants.RUN_STOP, None, {"status": "success" if status == "success" else "aborted"})

    def _open(self, path: Path) -> MLLogger:
        from mlperf_logging.mllog.mllog import MLLogger

        self._continues = self._length is not None
        try:
            path.touch()
            os.truncate(path, self._length or 0)
            self._file = path.open("a")
        except OSError as error:
            raise TimetrialError(f"cannot write {error.filename}: {error.strerror}; choose another run_dir") from None
        logger = logging.Logger("timetrial.mllog", logging.INFO)  # one run's lines must not reach another's log
        logger.addHandler(logging.StreamHandler(self._file))
        return MLLogger(logger, root_dir=str(Path(__file__).parent))

    def _write_header(self, ctx: RunContext) -> None:
        """What the official checker wants to see before the clock, the end of initialisation, and the start."""
        from mlperf_logging.mllog import constants

        assert self._mllog is not None
        workload, submission = ctx.workload, vars(ctx.config.submission)
        header: dict[str, Any] = {"submission_benchmark": workload.spec.benchmark}
        header |= {f"submission_{key}": submission[key] for key in ("org", "division", "status", "platform")}
        header |= {key: getattr(workload, key) for key in ("train_samples", "eval_samples", "global_batch_size")}
        header |= {constants.SEED: ctx.seed, constants.GRADIENT_ACCUMULATION_STEPS: ctx.parts.micro_batches}
        for key, value in {**header, **workload.log_values()}.items():
            self._mllog.event(key, value)
        for name in workload.weight_names(ctx.model):
            self._mllog.event(constants.WEIGHTS_INITIALIZATION, None, {"tensor": name})
        self._mllog.end(constants.INIT_STOP)
        self._mllog.start(constants.RUN_START)

    @hookimpl
    def on_block(self, event: Literal["start", "stop"], first_epoch: int, epochs: int) -> None:
        if self._mllog is None:
            return
        from mlperf_logging.mllog import constants

        if event == "start":
            metadata = {"first_epoch_num": first_epoch, "epoch_count": epochs}
            self._mllog.start(constants.BLOCK_START, None, metadata)
        else:
            self._mllog.end(constants.BLOCK_STOP, None, {"first_epoch_num": first_epoch})

    @hookimpl
    def on_eval(self, ctx: RunContext, position: Position, done: int, quality: Mapping[str, float] | None) -> None:
        if self._mllog is None:
            return
        from mlperf_logging.mllog import constants

        if quality is None:
            self._mllog.start(constants.EVAL_START, None, {"epoch_num": done})
            return
        targets = ctx.workload.targets
        several = {target.log_name: quality[target.metric] for target in targets}
        accuracy = several if len(targets) > 1 else quality[targets[0].metric]
        self._mllog.event(constants.EVAL_ACCURACY, accuracy, {"epoch_num": done})
        self._mllog.end(constants.EVAL_STOP, None, {"epoch_num": done})
