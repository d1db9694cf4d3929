"""Initial weights: both layouts, by name, and everything that can be wrong with them."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from core.api.errors import CheckpointError
from timetrial_bert import checkpoints
from timetrial_bert.workload import BertWorkload

MakeWorkload = Callable[..., BertWorkload]

TINY = ("size=tiny", "vocab_size=100", "max_positions=32", "sequence_length=32")


@pytest.fixture
def network(make: MakeWorkload) -> Any:
    return make("bert_mlperf", *TINY, "init_checkpoint=null").build_model().network


@pytest.fixture
def other(make: MakeWorkload) -> Any:
    return make("bert_mlperf", *TINY, "init_checkpoint=null", seed=2).build_model().network


def tf_arrays(network: Any) -> dict[str, Any]:
    """As the reference's TensorFlow checkpoint stores them."""
    arrays = {checkpoints.tf_name(name): p.detach().numpy() for name, p in network.named_parameters()}
    return {name: a.T if name.endswith("kernel") else a for name, a in arrays.items()}


def assert_same(one: Any, two: Any) -> None:
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_tensorflow_layout_is_mapped(network: Any, other: Any, tmp_path: Path) -> None:
    arrays = tf_arrays(other)
    kernel = arrays["bert/encoder/layer_1/intermediate/dense/kernel"]
    assert kernel.shape == (128, 512)  # [inputs, outputs]
    extra: Any = {"global_step": np.array(28252), "bert/pooler/dense/kernel/adam_m": np.zeros((128, 128))}
    np.savez(tmp_path / "phase1.npz", **arrays, **extra)
    checkpoints.load(network, str(tmp_path / "phase1.npz"))
    assert_same(network, other)


def test_tensorflow_names_may_come_in_safetensors(network: Any, other: Any, tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(a.copy()) for name, a in tf_arrays(other).items()}
    safetensors.torch.save_file(tensors, tmp_path / "phase1.safetensors")
    checkpoints.load(network, str(tmp_path / "phase1.safetensors"))
    assert_same(network, other)


def test_the_references_pytorch_layout_is_mapped(network: Any, other: Any, tmp_path: Path) -> None:
    """Old spellings, the tied copies and the constant, under "model", as the converted checkpoint has them."""
    state = {
        name.replace("intermediate.dense.", "intermediate.dense_act.").replace("LayerNorm.weight", "LayerNorm.gamma"): t
        for name, t in other.state_dict().items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(32)[None]
    assert "cls.predictions.decoder.weight" in state
    torch.save({"model": state}, tmp_path / "phase1.pt")
    checkpoints.load(network, str(tmp_path / "phase1.pt"))
    assert_same(network, other)
    plain = {f"module.{name}": t for name, t in other.named_parameters()}
    torch.save(plain, tmp_path / "plain.pt")
    checkpoints.load(network, str(tmp_path / "plain.pt"))


def test_missing_extra_and_misshapen_tensors_are_named(network: Any, other: Any, tmp_path: Path) -> None:
    state = dict(other.named_parameters())
    del state["bert.pooler.dense.bias"]
    state["bert.encoder.layer.2.output.dense.bias"] = torch.zeros(128)
    state["cls.predictions.bias"] = torch.zeros(99)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(network, str(tmp_path / "bad.pt"))
    message = str(caught.value)
    assert "bert.pooler.dense.bias is missing" in message
    assert "bert.encoder.layer.2.output.dense.bias is not in the model" in message
    assert "cls.predictions.bias is (99,), the model's (100,)" in message


def test_a_missing_tensorflow_tensor_is_named(network: Any, other: Any, tmp_path: Path) -> None:
    arrays = tf_arrays(other)
    del arrays["cls/predictions/output_bias"]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"cls.predictions.bias is missing"):
        checkpoints.load(network, str(tmp_path / "bad.npz"))


def test_untied_copies_are_refused(network: Any, other: Any, tmp_path: Path) -> None:
    state = dict(other.state_dict())
    state["cls.predictions.decoder.weight"] = torch.zeros(100, 128)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"decoder.weight differs from bert.embeddings.word_embeddings.weight"):
        checkpoints.load(network, str(tmp_path / "bad.pt"))


@pytest.mark.parametrize("name", ["a.pt", "a.npz", "a.safetensors"])
def test_what_is_no_checkpoint_is_refused(network: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.load(network, str(tmp_path / name))
    (tmp_path / name).write_bytes(b"something else entirely")
    with pytest.raises(CheckpointError, match=r"is not a .npz, .safetensors or torch.save file"):
        checkpoints.load(network, str(tmp_path / name))


def test_a_pickle_that_runs_code_is_refused(network: Any, tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError):
        checkpoints.load(network, str(tmp_path / "a.pt"))


def test_names_of_bert_large_are_the_closed_rules(make: MakeWorkload) -> None:
    rules = importlib.resources.files("mlperf_logging") / "compliance_checker/training_1.1.0/closed_bert.yaml"
    (check,) = (entry["END"]["CHECK"] for entry in yaml.safe_load(rules.read_text()) if "END" in entry)
    closed = eval(check.partition("sorted([")[2].rpartition("])")[0].join("[]"))
    workload = make("bert_mlperf", *TINY, "init_checkpoint=null")
    with torch.device("meta"):
        from transformers import BertForPreTraining

        from timetrial_bert.model import network_config

        large = BertForPreTraining(
            network_config("large", vocab_size=9, max_positions=8, dropout=0.1, attention="sdpa", init_std=0.02)
        )
    holder = torch.nn.Module()
    holder.network = large
    names = workload.weight_names(holder)
    assert len(names) == 398
    assert sorted(names) == sorted(closed)
