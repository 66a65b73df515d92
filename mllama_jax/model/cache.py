"""What a decoder remembers: keys and values of the text so far, and of the pictures."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from mllama_jax.config import TextConfig


@struct.dataclass
class KVCache:
    """Keys and values of one layer, each [B, K, S, H].

    Positions stand beside the head width because a TPU keeps the last two axes in tiles of 8 x 128: with the heads
    there it would copy the whole cache at each dispatch.

    `fresh` says that nothing is in it and that what comes first begins at position 0: those tokens need not look at it.
    """

    k: jax.Array
    v: jax.Array
    fresh: bool = struct.field(pytree_node=False, default=False)
    axes: ClassVar[tuple[str, ...]] = ("batch", "kv_heads", "cache", "head_dim")

    def write(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> KVCache:
        """Put k, v [B, T, K, H] at positions int [B, T], a run of consecutive ones in each row."""

        def put(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, jnp.swapaxes(new, 0, 1).astype(old.dtype), (0, start, 0))

        start = positions[:, 0]
        return KVCache(jax.vmap(put)(self.k, k, start), jax.vmap(put)(self.v, v, start))


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

    def tiles(self, positions: jax.Array) -> jax.Array:
        """bool [B, T, M]: which tiles the text positions int [B, T] may see."""
        start, end = self.spans[:, None, :, 0], self.spans[:, None, :, 1]
        return (start <= positions[:, :, None]) & (positions[:, :, None] < end)

    def visible(self, positions: jax.Array) -> jax.Array:
        """bool [B, T, S]: which cached positions the text positions int [B, T] may see."""
        padded = self.layers[0].k.shape[2] // self.spans.shape[1]
        visible = self.tiles(positions)[..., None] & (jnp.arange(padded) < self.tokens)
        return visible.reshape(*positions.shape, -1)

    def sees(self, positions: jax.Array) -> jax.Array:
        """bool [B, T]: whether the text positions int [B, T] see any tile."""
        return self.tiles(positions).any(axis=-1)


def empty_cache(config: TextConfig, rows: int, length: int, dtype: jnp.dtype) -> tuple[KVCache, ...]:
    """An empty self-attention cache: one [rows, K, length, H] pair for each self-attention layer."""
    shape = (rows, config.kv_heads, length, config.head_dim)
    return tuple(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in config.self_layers)
