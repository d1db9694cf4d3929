"""Initial weights from a file, mapped by name: the reference's TensorFlow layout, or PyTorch's.

A TensorFlow name is a path, such as "bert/encoder/layer_0/attention/self/query/kernel"; kernels of dense layers are
stored [inputs, outputs] and are transposed here. These names are also the closed rules'. A PyTorch name is dotted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from core.api.errors import CheckpointError

STARTER = Path(__file__).parent / "assets" / "starter.safetensors"

_TF_EXTRA = re.compile(r"(^|/)(global_step|adam_m|adam_v)$")
"""What a TensorFlow checkpoint holds besides weights: the step and the optimizer's two moments."""
_TORCH_EXTRA = re.compile(r"(^|\.)position_ids$")
"""A constant that older versions of transformers saved."""
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
"""Second names of tensors that the model holds once; a file may carry both."""
_SYNONYMS = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"), ("dense_act.", "dense."))
"""Spellings of the first PyTorch ports, and of the reference's converted checkpoint."""


def tf_name(name: str) -> str:
    """The TensorFlow name of one of BertForPreTraining's parameters."""
    if name == "cls.predictions.bias":
        return "cls/predictions/output_bias"
    if name.startswith("cls.seq_relationship."):
        return f"cls/seq_relationship/output_{name.rpartition('.')[2].replace('weight', 'weights')}"
    path = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", name).replace(".", "/")
    if "LayerNorm" in path:
        return path.replace("LayerNorm/weight", "LayerNorm/gamma").replace("LayerNorm/bias", "LayerNorm/beta")
    if "_embeddings/" in path:
        return path.removesuffix("/weight")
    return f"{path.removesuffix('weight')}kernel" if path.endswith("/weight") else path


def load(network: nn.Module, source: str) -> None:
    """Copies a checkpoint into a BertForPreTraining. `source` is "starter" (this package's own), or a file: .npz or
    .safetensors with TensorFlow or PyTorch names, or what torch.save wrote.

    Raises CheckpointError where it cannot be read, and where a tensor, which it names, is missing, left over or of
    another shape.
    """
    path = STARTER if source == "starter" else Path(source).expanduser()
    found = read(path)
    wanted = dict(network.named_parameters())
    if any("/" in name for name in found):
        found = _from_tf({name: t for name, t in found.items() if not _TF_EXTRA.search(name)}, wanted)
    else:
        found = _from_torch(found, path)
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not in the model" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(found[name].shape)}, the model's {tuple(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in found and found[name].shape != parameter.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path} does not fit the model: {'; '.join(sorted(problems)[:3])}{more}. "
            "Check workload.size, vocab_size and max_positions, or set workload.init_checkpoint=null"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by the names that it gives them."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist: set workload.init_checkpoint to a file") from None
    except Exception as error:  # torch's unpickler fails with whatever the next byte makes of it
        reason = str(error).split("\n")[0][:200]
        raise CheckpointError(f"{path} is not a .npz, .safetensors or torch.save file of tensors: {reason}") from None
    tree = tree.get("model", tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tree.values()):
        raise CheckpointError(f'{path} has no state_dict (nor one under "model"): save model.state_dict()')
    return dict(tree)


def _from_tf(found: dict[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    names = {tf_name(name): name for name in wanted}
    return {names.get(tf, tf): t.T if tf.endswith("/kernel") else t for tf, t in found.items()}


def _from_torch(found: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in found.items():
        name = name.removeprefix("module.").removeprefix("network.")
        for old, new in _SYNONYMS:
            name = name.replace(old, new)
        if not _TORCH_EXTRA.search(name):
            renamed[name] = tensor
    for copy, name in _TIED.items():
        tensor = renamed.pop(copy, None)
        if tensor is not None and not torch.equal(tensor, renamed.setdefault(name, tensor)):
            raise CheckpointError(f"{path}: {copy} differs from {name}, with which BERT shares it")
    return renamed
