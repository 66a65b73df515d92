"""Softmax attention, grouped by key/value head, behind one function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mllama_jax.model.layers import Axes, Constrain, einsum, unconstrained
from mllama_jax.model.quantize import Int8

MARKS = 16  # features of a mask that `gpu_attention` takes
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
        spans: int32 [B, M, 2], the positions [start, end) that see each tile; two of a row are the same or apart.
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

    def segments(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """int [B, T] of the positions int [B, T] and int [B, S] of the keys: equal where one sees the other."""
        start, end = self.spans[..., 0], self.spans[..., 1]
        queries = jnp.where(self.tiles(positions), start[:, None], -1).max(axis=-1)
        keys = jnp.where((start < end)[..., None] & (jnp.arange(self.padded) < self.tokens), start[..., None], -2)
        return queries, rearrange(keys, "b m n -> b (m n)")

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
    """What computes attention for queries and keys like these: in half precision kernels that write no scores to
    memory, `gpu_decode`'s, `gpu_attention`'s and cuDNN's on a GPU, those of `tpu_attention` on a TPU. XLA otherwise,
    which has float32, keys whose positions a mesh splits, and int8 ones of which a kernel would need a copy: where
    queries are few, or are not all there is to read of a cache."""
    T, small, whole = q.shape[1], isinstance(k, Int8), constrain.parts(axes[-1]) == 1
    if q.dtype == jnp.float32:
        return xla
    if constrain.platform == "gpu":
        if T == 1 and visible is not None and whole:
            return functools.partial(by_decode_kernel, constrain=constrain, axes=axes)
        few = (isinstance(visible, UpTo) and visible.first) or (
            isinstance(visible, InSpan) and visible.spans.shape[1] < MARKS
        )
        if T > 1 and few and whole and on_hopper(constrain, q.dtype):
            return functools.partial(by_flash_kernel, constrain=constrain, axes=axes)
        return xla if small and T == 1 else cudnn
    if constrain.platform == "tpu" and whole:
        from mllama_jax.model import tpu_attention

        if isinstance(visible, UpTo) and not visible.first and not small:
            return functools.partial(tpu_attention.over_cache, constrain=constrain, axes=axes)
        if T >= tpu_attention.LANES and (visible is None or isinstance(visible, UpTo | InSpan)):
            return functools.partial(tpu_attention.over_all, constrain=constrain, axes=axes)
    return xla


def on_hopper(constrain: Constrain, dtype: jnp.dtype) -> bool:
    """Whether `gpu_attention` has a kernel for these devices and this dtype."""
    if constrain.platform != "gpu" or dtype == jnp.float32:
        return False
    return getattr(jax.local_devices()[0], "compute_capability", None) == "9.0"


def by_decode_kernel(
    q: jax.Array, k: jax.Array | Int8, v: jax.Array | Int8, queries: jax.Array, visible: Callable, scale: float,
    constrain: Constrain, axes: Axes,
) -> jax.Array:  # fmt: skip
    """By `gpu_decode`, each device with its own rows and heads."""
    from mllama_jax.model.gpu_decode import single_query

    batch, heads, group, _ = axes

    def attend(q: jax.Array, k: Any, v: Any, seen: jax.Array) -> jax.Array:
        return single_query(q[:, 0], k, v, seen, scale)[:, None]

    inputs = (batch, None, heads, group), (batch, heads), (batch, heads), (batch,)
    return constrain.local(attend, inputs, inputs[0])(q, k, v, visible(queries)[:, 0])


def by_flash_kernel(
    q: jax.Array, k: jax.Array | Int8, v: jax.Array | Int8, queries: jax.Array, visible: UpTo | InSpan, scale: float,
    constrain: Constrain, axes: Axes,
) -> jax.Array:  # fmt: skip
    """By `gpu_attention`, each device with its own rows and heads."""
    from mllama_jax.model.gpu_attention import flash

    batch, heads, group, _ = axes
    marks = visible.marks(queries, q.dtype, MARKS) if isinstance(visible, InSpan) else ()

    def attend(q: jax.Array, k: Any, v: Any, *marks: jax.Array) -> jax.Array:
        K = q.shape[2]
        q = rearrange(q, "b t k g h -> b t (k g) h")
        k, v = (x.widen(q.dtype) if isinstance(x, Int8) else x for x in (k, v))
        return rearrange(flash((q, k, v), *marks, scale=scale, causal=not marks), "b t (k g) h -> b t k g h", k=K)

    inputs = (batch, None, heads, group), (batch, heads), (batch, heads), *((batch,) for _ in marks)
    return constrain.local(attend, inputs, inputs[0])(q, k, v, *marks)


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


def cudnn(
    q: jax.Array,
    k: jax.Array | Int8,
    v: jax.Array | Int8,
    queries: jax.Array | None,
    visible: Callable | None,
    scale: float,
) -> jax.Array:
    """By cuDNN's fused kernel, which wants its keys [rows, S, heads, H]; half precision only."""
    B, T, K, G, _ = q.shape
    k, v = (x.widen(q.dtype) if isinstance(x, Int8) else x for x in (k, v))
    lengths = mask = None
    causal = isinstance(visible, UpTo) and visible.first
    if isinstance(visible, UpTo) and T == 1 and queries is not None:
        lengths = queries[:, 0] + 1
    elif not causal and visible is not None and queries is not None:
        mask = visible(queries)
    if T == 1:  # a key/value head as a row of its own: the cache stays where it is
        q = rearrange(q, "b t k g h -> (b k) t g h")
        k, v = (rearrange(x, "b k s h -> (b k) s 1 h") for x in (k, v))
        mask, lengths = (None if x is None else jnp.repeat(x, K, axis=0) for x in (mask, lengths))
    else:
        q = rearrange(q, "b t k g h -> b t (k g) h")
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if mask is None else mask[:, None],
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    if T == 1:
        return rearrange(y, "(b k) t g h -> b t k g h", b=B)
    return rearrange(y, "b t (k g) h -> b t k g h", g=G)


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`; 1 where there is none."""
    return next((d for d in range(min(n, most), 0, -1) if n % d == 0), 1)
