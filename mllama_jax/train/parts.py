"""Which part of a model is trained: its adapter, a low-rank addition, or all of it; the rest is another tree."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.apply import Path, insert, paths
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import Params, abstract_parameters

Part = Literal["adapter", "lora", "full"]

TARGETS = r"^text/layers_\d+/(attention|mlp)/"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (arXiv:2106.09685): a kernel W becomes `W + alpha / rank * b a`.

    Attributes:
        targets: a regular expression, searched for in names of linear maps such as `text/layers_0/attention/q`.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank: expected at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise InputError(f"lora.alpha: expected more than 0, got {self.alpha}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise InputError(f"lora.targets: expected a regular expression, got {self.targets!r}: {error}") from None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_trained(config: MllamaConfig, part: Part, path: Path) -> bool:
    """Whether a parameter of the checkpoint is trained; of `lora` none is.

    The adapter is the vision encoder, the projector and the cross-attention layers.
    """
    if part == "adapter":
        return path[0] != "text" or path[1] in {f"layers_{i}" for i in config.text.cross_layers}
    return part == "full"


def split(params: Params, config: MllamaConfig, part: Part) -> tuple[Params, Params]:
    """A tree of parameters as the part that is trained and the frozen rest."""
    if part == "adapter" and config.vision is None:
        raise InputError("part: 'adapter' trains what sees, and this model is text-only; choose lora or full")
    flat = paths(params)
    return (
        _tree({path: leaf for path, leaf in flat.items() if is_trained(config, part, path)}),
        _tree({path: leaf for path, leaf in flat.items() if not is_trained(config, part, path)}),
    )


def merge(trained: Params, frozen: Params, lora: Lora) -> Params:
    """The parameters that the model takes, of its two parts; the inverse of `split`."""

    def scaled(path: Path, leaf: Any) -> Any:
        return leaf * lora.scale if path[-1] == "lora_b" else leaf

    own = {path: scaled(path, leaf) for path, leaf in paths(trained).items()}
    return _tree(paths(frozen) | own)


def lora_shapes(config: MllamaConfig, lora: Lora) -> Params:
    """The tree of `lora_a` and `lora_b`, abstract and boxed with logical axis names, where the kernels lie.

    Of a kernel [out..., in] they are [rank, in] and [out..., rank]; of one that fuses several maps along its first
    axis, each has its own: [parts, rank, in].
    """
    found: dict[Path, Any] = {}
    for path, leaf in kernels(config).items():
        if not is_adapted(lora, path):
            continue
        shape, names = leaf.value.shape, leaf.names
        parts = shape[:1] if names[0] is None else ()
        a, b = (*parts, lora.rank, shape[-1]), (*shape[:-1], lora.rank)
        found[(*path, "lora_a")] = _boxed(a, (*(None,) * len(parts), None, names[-1]))
        found[(*path, "lora_b")] = _boxed(b, (*names[:-1], None))
    if not found:
        maps = ["/".join(path) for path in kernels(config)]
        raise InputError(f"lora.targets: {lora.targets!r} matches none of {len(maps)} linear maps, such as {maps[0]}")
    return _tree(found)


def kernels(config: MllamaConfig) -> dict[Path, nn.Partitioned]:
    """The kernels of all linear maps, abstract, by the maps' paths."""
    return {path[:-1]: leaf for path, leaf in paths(abstract_parameters(config)).items() if path[-1] == "kernel"}


def is_adapted(lora: Lora, path: Path) -> bool:
    """Whether a linear map gets a low-rank addition."""
    return re.search(lora.targets, "/".join(path)) is not None


def _boxed(shape: tuple[int, ...], names: tuple[str | None, ...]) -> nn.Partitioned:
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def init_lora(config: MllamaConfig, lora: Lora, key: jax.Array) -> Params:
    """Float32 pairs that change nothing yet: `a` as PEFT draws it (Kaiming-uniform with slope sqrt 5), `b` zero."""

    def draw(i: int, path: Path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1] == "lora_b":
            return jnp.zeros(leaf.shape)
        bound = 1 / math.sqrt(leaf.shape[-1])
        return jax.random.uniform(jax.random.fold_in(key, i), leaf.shape, minval=-bound, maxval=bound)

    flat = paths(nn.unbox(lora_shapes(config, lora)))
    return _tree({path: draw(i, path, leaf) for i, (path, leaf) in enumerate(flat.items())})


def _tree(leaves: Mapping[Path, Any]) -> Params:
    """The inverse of `paths`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        insert(tree, path, leaf)
    return tree
