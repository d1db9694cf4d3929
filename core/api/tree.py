"""Batches and other pytrees of tensors. Imports torch; importing it makes `Batch` a pytree."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from core.api.batch import Batch

__all__ = ["map_tensors", "tensors"]

T = TypeVar("T")

# What a step consumes besides its tensors is part of a batch's structure: captured graphs are told apart by it.
pytree.register_pytree_node(
    Batch, lambda batch: ([batch.data], (batch.samples, batch.weight)), lambda data, rest: Batch(*data, *rest)
)


def map_tensors(function: Callable[[Tensor], Any], tree: T) -> T:
    """The tree with `function` applied to each of its tensors; other leaves stay."""
    return pytree.tree_map_only(Tensor, function, tree)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
