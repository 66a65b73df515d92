"""Softmax attention, grouped by key/value head, behind one function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from mllama_jax.model.einsum import einsum
from mllama_jax.model.layers import Axes, Constrain, on_hopper, unconstrained
from mllama_jax.model.quantize import Int8

SCORES_AT_ONCE = 2**28  # of all rows and heads, before they are spread over a mesh


@dataclasses.dataclass(frozen=True)
class UpTo:
    """A query sees the keys up to its own position: `visible` of causal attention over `keys` positions.

    `first` says that the queries stand at positions 0, 1, 2 ..., one for each key.
    """

    keys: int
    first: bool = False

    def __call__(self, positions: jax.Array) -> jax.Array:
        return jnp.arange(self.keys) <= positions[:, :, None]


@dataclasses.dataclass(frozen=True)
class InSpan:
    """A query sees the tiles in whose spans it stands: `visible` of cross-attention.

    Attributes:
        spans: int32 [B, M, 2], the positions [start, end) that see each tile; (0, 0) for a tile that is not there.
        tokens, padded: of the `padded` keys of a tile the first `tokens` are real.
    """

    spans: jax.Array
    tokens: int
    padded: int

    def tiles(self, positions: jax.Array) -> jax.Array:
        """bool [B, T, M]: which tiles the positions int [B, T] may see."""
        start, end = self.spans[:, None, :, 0], self.spans[:, None, :, 1]
        return (start <= positions[:, :, None]) & (positions[:, :, None] < end)

    def __call__(self, positions: jax.Array) -> jax.Array:
        visible = self.tiles(positions)[..., None] & (jnp.arange(self.padded) < self.tokens)
        return visible.reshape(*positions.shape, -1)

    def of_keys(self) -> jax.Array:
        """int32 [B, 2, S]: the span of each key, (0, 0) of one that is not real."""
        real = jnp.arange(self.padded) < self.tokens
        return rearrange(jnp.where(real[:, None], self.spans[:, :, None], 0), "b m n ends -> b ends (m n)")

    def marks(self, positions: jax.Array, dtype: jnp.dtype, features: int) -> tuple[jax.Array, jax.Array]:
        """[B, T, features] of the positions int [B, T] and [B, S, features] of the keys: the products of two are 0
        where one sees the other and at most -2^16 elsewhere. There are as many features as tiles, and one."""
        (B, M), width = self.spans.shape[:2], ((0, 0), (0, 0), (0, features - self.spans.shape[1] - 1))
        blind = jnp.pad(~self.tiles(positions), ((0, 0), (0, 0), (0, 1)), constant_values=True)
        tile = jnp.repeat(jnp.eye(M, dtype=bool), self.padded, axis=0)
        behind = jnp.tile(jnp.arange(self.padded) >= self.tokens, M)[:, None]
        of_keys = jnp.broadcast_to(jnp.concatenate([tile, behind], axis=1), (B, M * self.padded, M + 1))
        queries, keys = (jnp.pad(x, width).astype(dtype) * 2.0**8 for x in (blind, of_keys))
        return -queries, keys


def attention(
    q: jax.Array,
    k: jax.Array | Int8,
    v: jax.Array | Int8,
    queries: jax.Array | None,
    visible: Callable[[jax.Array], jax.Array] | None,
    scale: float | None = None,
    constrain: Constrain = unconstrained,
    axes: Axes = ("batch", "kv_heads", "queries", "seq"),
) -> jax.Array:
    """Attend from q [B, T, K, G, H] to k, v [B, K, S, H].

    A query that sees no key gets no meaningful result: callers zero such rows. `back_end` chooses who computes it.

    Args:
        queries: [B, T], what `visible` has to know of each query, such as its position.
        visible: from `queries` [B, t] of some of the T to the keys that these may see, bool [B, t, S]; None for all.
        scale: of the scores, H ** -0.5 if None.
        axes: what B, K, G and S are called on the mesh of `constrain`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return back_end(q, k, visible, constrain, axes)(q, k, v, queries, visible, scale)


BackEnd = Callable[..., jax.Array]


def back_end(q: jax.Array, k: jax.Array | Int8, visible: Callable | None, constrain: Constrain, axes: Axes) -> BackEnd:
    """What computes attention for queries and keys like these: in half precision the kernels of `gpu_attention` and
    `tpu_attention`, which write no scores to memory. XLA otherwise, which has float32, keys whose positions a mesh
    splits, and int8 ones of which a kernel would need a copy: where queries are few, or not all there is to read."""
    T, small, whole = q.shape[1], isinstance(k, Int8), constrain.parts(axes[-1]) == 1
    kernel = None
    if q.dtype != jnp.float32 and whole and constrain.platform == "gpu":
        from mllama_jax.model import gpu_attention as gpu
        from mllama_jax.model.gpu_decode import QUERIES

        if small and T == 1 and q.shape[3] <= QUERIES:
            kernel = gpu.over_int8
        elif T > 1 and isinstance(visible, InSpan) and gpu.takes(visible) and on_hopper(constrain, q.dtype):
            kernel = gpu.by_flash
        else:
            kernel = gpu.by_cudnn
    if q.dtype != jnp.float32 and whole and constrain.platform == "tpu":
        from mllama_jax.model import tpu_attention as tpu

        if isinstance(visible, InSpan) or (isinstance(visible, UpTo) and not visible.first):
            kernel = None if small else tpu.over_cache
        else:
            kernel = tpu.over_all if T >= tpu.MANY and (visible is None or isinstance(visible, UpTo)) else None
    return xla if kernel is None else functools.partial(kernel, constrain=constrain, axes=axes)


def spread(attend: Callable, constrain: Constrain, axes: Axes) -> Callable:
    """`attend(q, k, v, *of_rows)` on a mesh that splits no keys by their positions, each device with its own part."""
    batch, heads, group, _ = axes
    of_queries, of_keys = (batch, None, heads, group), (batch, heads)

    def local(q: jax.Array, k: jax.Array | Int8, v: jax.Array | Int8, *of_rows: jax.Array) -> jax.Array:
        inputs = (of_queries, of_keys, of_keys, *((batch,) for _ in of_rows))
        return constrain.local(attend, inputs, of_queries)(q, k, v, *of_rows)

    return local


def xla(
    q: jax.Array,
    k: jax.Array | Int8,
    v: jax.Array | Int8,
    queries: jax.Array | None,
    visible: Callable | None,
    scale: float,
) -> jax.Array:
    """In plain products. Long inputs go block by block of queries, so that neither scores nor mask ever exist for all
    T x S pairs; a backward pass makes them anew."""

    def attend(q: jax.Array, queries: jax.Array | None) -> jax.Array:
        mask = None if visible is None or queries is None else visible(queries)
        weights = attention_weights(q, k, mask, scale)
        if isinstance(v, Int8):
            weights = weights * v.scale[:, :, None, None]
        return einsum("bkgts,bksh->btkgh", weights.astype(q.dtype), numbers(v, q.dtype))

    B, T, K, G, _ = q.shape
    t = largest_divisor(T, SCORES_AT_ONCE // (B * K * G * k.shape[2]))
    if t == T:
        return attend(q, queries)
    blocks = rearrange(q, "b (n t) k g h -> n b t k g h", t=t)
    if queries is not None:
        queries = rearrange(queries, "b (n t) -> n b t", t=t)
    blocks = jax.lax.map(jax.checkpoint(lambda block: attend(*block)), (blocks, queries))
    return rearrange(blocks, "n b t k g h -> b (n t) k g h")


def attention_weights(
    q: jax.Array, k: jax.Array | Int8, mask: jax.Array | None, scale: float | None = None
) -> jax.Array:
    """How much each query of q [B, T, K, G, H] takes of each key of k [B, K, S, H]: float32 [B, K, G, T, S].

    The bool mask is [B, T, S]; scores and softmax are float32.
    """
    scores = einsum("btkgh,bksh->bkgts", q, numbers(k, q.dtype)).astype(jnp.float32)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(k, Int8):
        scores *= k.scale[:, :, None, None]
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def numbers(x: jax.Array | Int8, dtype: jnp.dtype) -> jax.Array:
    """What a product reads of keys or values: of int8 ones the bare integers, which half precision holds exactly; their
    scales go to the scores or weights, so that the compiler can convert on the way and keep no wide copy."""
    return x.values.astype(dtype) if isinstance(x, Int8) else x


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`; 1 where there is none."""
    return next((d for d in range(min(n, most), 0, -1) if n % d == 0), 1)
