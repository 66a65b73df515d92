"""What a decoder remembers: keys and values of the text so far, and of the pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from mllama_jax.model.attention import InSpan
from mllama_jax.model.quantize import Int8


@struct.dataclass
class KVCache:
    """Keys and values of one layer, each [B, K, S, H]; in int8 with a scale for each [B, K, S].

    Positions stand beside the head width because a TPU keeps the last two axes in tiles of 8 x 128: with the heads
    there it would copy the whole cache at each dispatch.

    `fresh` says that nothing is in it and that what comes first begins at position 0: those tokens need not look at it.
    """

    k: jax.Array | Int8
    v: jax.Array | Int8
    fresh: bool = struct.field(pytree_node=False, default=False)
    axes: ClassVar[tuple[str, ...]] = ("batch", "kv_heads", "cache", "head_dim")

    @property
    def rows(self) -> int:
        """B."""
        return self.k.shape[0]

    @property
    def length(self) -> int:
        """S, for how many positions there is room."""
        return self.k.shape[2]

    def quantized(self) -> KVCache:
        """The same in int8."""
        return jax.tree.map(Int8.of, self)

    def like(self, k: jax.Array, v: jax.Array) -> KVCache:
        """k, v [B, T, K, H] as this cache would keep them, [B, K, T, H]."""
        new = KVCache(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
        return new.quantized() if isinstance(self.k, Int8) else new

    def write(self, new: KVCache, positions: jax.Array) -> KVCache:
        """Put what `like` made of T positions at positions int [B, T], a run of consecutive ones in each row."""

        def put(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, start, *(0,) * (old.ndim - 2)))

        def put_each(old: jax.Array, new: jax.Array) -> jax.Array:
            if len(start) == 1:  # of the scatter that vmap makes XLA makes three more kernels a layer on a GPU
                return put(old[0], new[0], start[0])[None]
            return jax.vmap(put)(old, new, start)

        start = positions[:, 0]
        each = functools.partial(jax.tree.map, put_each)
        return KVCache(each(self.k, new.k), each(self.v, new.v))

    def placed(self, constrain: Callable[..., jax.Array], positions: str = "cache") -> KVCache:
        """Where it lies on a mesh; `positions` is what its positions are called there."""
        axes = tuple(positions if axis == "cache" else axis for axis in self.axes)
        return jax.tree.map(lambda x: constrain(x, *axes[: x.ndim]), self)


@struct.dataclass
class CrossCache:
    """What the cross-attention layers see: keys and values of the rows' tiles, and who may see them.

    Attributes:
        layers: one KVCache a cross-attention layer, S = M * N' positions.
        spans: int32 [B, M, 2], the text positions [start, end) that see each tile; (0, 0) for a tile that is not there.
        tokens: N, how many of a tile's N' positions are real. N' is a multiple of 8: a TPU keeps memory in tiles of
            eight such rows, and would copy every layer's keys and values to align them.
    """

    layers: tuple[KVCache, ...]
    spans: jax.Array
    tokens: int = struct.field(pytree_node=False)

    @property
    def visible(self) -> InSpan:
        """From text positions int [B, T] to which cached positions these may see, bool [B, T, S]."""
        return InSpan(self.spans, self.tokens, self.layers[0].length // self.spans.shape[1])

    def sees(self, positions: jax.Array) -> jax.Array:
        """bool [B, T]: whether the text positions int [B, T] see any tile."""
        return self.visible.tiles(positions).any(axis=-1)
