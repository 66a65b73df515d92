"""From the abstract tree of parameters to where each one lies, and what that costs a device."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mllama_jax.config import MllamaConfig
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import Params, abstract_parameters
from mllama_jax.model.quantize import in_order
from mllama_jax.sharding.rules import Rules


def resolve(config: MllamaConfig, rules: Rules, dtype: np.dtype, quantize: str | None = None) -> Params:
    """The tree of parameters as `jax.ShapeDtypeStruct` with shardings.

    Raises InputError, naming the parameter, its shape, the mesh and what would work, where an axis does not divide or
    would be split twice.
    """

    def place(path: tuple[Any, ...], leaf: nn.Partitioned) -> jax.ShapeDtypeStruct:
        shape = leaf.value.shape
        try:
            for size, name in zip(shape, leaf.names, strict=True):
                check_axis(size, name, rules)
            placed = jax.ShapeDtypeStruct(shape, leaf.value.dtype, sharding=rules.sharding(*leaf.names))
            return placed.update(sharding=in_order(placed, rules.platform))
        except InputError as error:
            where = "/".join(key.key for key in path)
            packed = (quantize or "").startswith("int4") and path[-1].key == "scale"
            groups = "; int4 splits between groups of inputs" if packed else ""
            raise InputError(f"{where} {list(shape)} on {rules.describe_mesh()}: {error}{groups}") from None

    boxed = abstract_parameters(config, dtype, quantize)
    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def check_axis(size: int, name: str | None, rules: Rules) -> None:
    """Raise InputError where a logical axis of this size does not divide over the mesh."""
    parts = rules.parts(name)
    if size % parts:
        works = [n for n in range(1, parts) if size % n == 0 and parts % n == 0]
        raise InputError(
            f"{name} of size {size} does not divide over {' x '.join(rules.axes(name))} = {parts}; {works} would"
        )


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of (abstract) arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
