"""Makes the starter checkpoint and its vocabulary, from scratch: `python -m timetrial_bert.starter`.

    vocab.txt              WordPiece tokens of the embedded articles that are not held out
    starter.safetensors    weights after a short run on them, in 16 bits

Trained from BERT's usual initial weights, the tiny model stays for minutes at what a model without context reaches: its
attention is uniform at first, and learns only slowly that a token's neighbours tell most about it. So the first
attention is given (`attend_to_neighbours`), and then everything is trained as in any run, for a minute and a half.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from timetrial_bert import articles, checkpoints, embedded, model, wordpiece
from timetrial_bert.text import documents

SEED = 2018
STEPS = 600
VOCABULARY_SIZE = 1024
SETTINGS = (
    "workload.optimizer=adamw",
    "workload.beta_2=0.999",
    "workload.base_learning_rate=0.002",
    "workload.training_steps=1600",
    "workload.lr_warmup_steps=50",
    "workload.global_batch_size=32",
    "workload.max_epochs=3",
    "workload.eval.every=6400",
)
"""What differs from `workload=bert` itself."""

INIT_STD = 0.07
"""Near 1 / sqrt(hidden size), which keeps activations at their size; BERT's 0.02 is so for 2,500."""
POSITION_RATIO = math.sqrt(2)
"""Amplitude of the sinusoids, in INIT_STD: half of an embedding's variance is position."""
OFFSETS = ((-1, 1), (-2, 2))
"""Of each layer, the place at which each head looks first: the previous token, the next one, and those beyond."""
GAIN = 1.2
"""Of queries and keys: scores differ by about 6 between the place looked at and the others."""
NOISE = 0.02
"""BERT's own deviation of initial weights, on top of the given queries and keys."""


@torch.no_grad()
def attend_to_neighbours(network: Any, generator: torch.Generator) -> None:
    """Sinusoidal positions, and queries and keys by which each head of each layer looks at one neighbour.

    A pair of dimensions holds (sin wt, cos wt) of position t (Vaswani et al. 2017, arXiv:1706.03762, section 3.5), here
    with frequencies w spread evenly up to pi. Queries copy a head's share of the pairs, keys turn it by w * offset, so
    that a query at t and a key at t + offset are equal, and their product is largest.
    """
    embeddings, config = network.bert.embeddings, network.config
    pairs = config.hidden_size // 2
    frequencies_F = (torch.arange(pairs) + 0.5) * math.pi / pairs
    angles_SF = torch.arange(config.max_position_embeddings)[:, None] * frequencies_F
    table = torch.stack([angles_SF.sin(), angles_SF.cos()], dim=-1).flatten(1)
    embeddings.position_embeddings.weight.copy_(table * INIT_STD * POSITION_RATIO)
    heads = config.num_attention_heads
    for layer, offsets in zip(network.bert.encoder.layer, OFFSETS, strict=True):
        query, key = layer.attention.self.query.weight, layer.attention.self.key.weight
        for weight in (query, key):
            weight.normal_(std=NOISE, generator=generator)
        for head, offset in enumerate(offsets):
            for number, pair in enumerate(range(head, pairs, heads)):
                row, column = head * config.hidden_size // heads + 2 * number, 2 * pair
                turn = float(frequencies_F[pair]) * offset
                sin, cos = math.sin(turn), math.cos(turn)
                query[row : row + 2, column : column + 2] += GAIN * torch.eye(2)
                key[row : row + 2, column : column + 2] += GAIN * torch.tensor([[cos, -sin], [sin, cos]])


def main() -> None:
    """Writes both files into this package."""
    found = articles.split(list(documents(embedded.find())))["train"]
    tokens = wordpiece.train([s for document in found for s in document], VOCABULARY_SIZE, lower_case=True)
    wordpiece.STARTER.write_text("".join(f"{token}\n" for token in tokens))
    generator = torch.Generator().manual_seed(SEED)
    config = model.network_config(
        "tiny", vocab_size=VOCABULARY_SIZE, max_positions=128, dropout=0.0, attention="eager", init_std=INIT_STD
    )
    built = model.PreTraining(config, model.encode, model.mlm_loss)
    model.initialise(built, generator)
    attend_to_neighbours(built.network, generator)
    names = [name for name, _ in built.network.named_parameters()]
    with tempfile.TemporaryDirectory() as folder:
        run, first = Path(folder) / "run", Path(folder) / "first.safetensors"
        safetensors.torch.save_file({name: built.network.get_parameter(name).detach() for name in names}, first)
        command = [sys.executable, "-m", "core.run", "workload=bert", f"workload.init_checkpoint={first}"]
        more = [f"seed={SEED}", f"stop.steps={STEPS}", f"run_dir={run}"]
        subprocess.run([*command, *SETTINGS, *more], check=False)  # its exit status says that it met no target
        trained = safetensors.torch.load_file(run / "checkpoints" / f"step_{STEPS:08d}" / "shared.safetensors")
    weights = {name: trained[f"shared/model/network.{name}"].half() for name in names}
    safetensors.torch.save_file(weights, checkpoints.STARTER)


if __name__ == "__main__":
    main()
