"""The plugin as core sees it: what it is, and the hooks that build it. Imports without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.api.config import require_root
from core.api.hooks import hookimpl
from core.api.types import Plugin, WorkloadSpec
from timetrial_bert.config import BertConfig

if TYPE_CHECKING:
    from core.api.config import RunConfig
    from core.api.preparation import Preparation
    from core.api.types import Plan, RunContext
    from timetrial_bert.workload import BertWorkload

NEEDED = "make it with `python -m core.prepare workload=bert_mlperf source=TEXT out=FOLDER`"

SPEC = WorkloadSpec(
    interface=2,
    summary="BERT masked-LM pre-training: Wikipedia articles from a wheel, MLPerf's phase 2",
    benchmark="bert",
    preparation=frozenset({
        "duplicates", "held_out", "lower_case", "masked_share", "masking", "max_predictions", "sequence_length",
        "shard_mib", "short_probability", "vocab_file", "vocab_size",
    }),
)  # fmt: skip


class Bert(Plugin):
    """BERT pre-training: `bert` and `bert_mlperf`."""

    spec = SPEC
    Config = BertConfig
    config: BertConfig

    @hookimpl
    def check(self, plan: Plan) -> None:
        require_root(plan.root.data, self.config.embedded_data, NEEDED)

    @hookimpl
    def environment(self, config: RunConfig) -> dict[str, str]:
        """Nothing here is ever fetched from a hub, and tokenisation leaves the other cores alone."""
        return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    @hookimpl
    def make_workload(self, ctx: RunContext) -> BertWorkload:
        from timetrial_bert.workload import BertWorkload  # imports torch

        return BertWorkload(SPEC, self.config, ctx)

    @hookimpl
    def prepare(self, preparation: Preparation) -> dict[str, int]:
        from timetrial_bert.prepare import run  # imports numpy and tokenizers

        return run(preparation, self.config)
