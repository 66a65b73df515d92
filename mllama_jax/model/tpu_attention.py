"""Attention on a TPU, by kernels that write no scores to memory; each device attends with its own rows and heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention

from mllama_jax.model.attention import InSpan, UpTo
from mllama_jax.model.layers import Axes, Constrain
from mllama_jax.model.quantize import Int8

LANES = 128  # of a TPU's registers: blocks of keys are multiples
QUERIES, KEYS = 512, 1024  # in a block of `over_cache`


def over_all(
    q: jax.Array,
    k: jax.Array | Int8,
    v: jax.Array | Int8,
    queries: jax.Array | None,
    visible: UpTo | InSpan | None,
    scale: float,
    constrain: Constrain,
    axes: Axes,
) -> jax.Array:
    """A back end of `attention` where all keys count: of pictures, of prompts from their beginning, of tiles."""
    k, v = (x.widen(q.dtype) if isinstance(x, Int8) else x for x in (k, v))
    if isinstance(visible, InSpan) and queries is not None:
        segments = visible.segments(queries)
    else:
        segments = tuple(jnp.zeros((len(q), n), jnp.int32) for n in (q.shape[1], k.shape[2]))
    attend = functools.partial(splash, causal=isinstance(visible, UpTo), scale=scale)
    return spread(attend, constrain, axes)(q, k, v, *segments)


def over_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: jax.Array,
    visible: UpTo,
    scale: float,
    constrain: Constrain,
    axes: Axes,
) -> jax.Array:
    """A back end of `attention` for queries at consecutive positions of a cache that is filled up to these."""
    return spread(functools.partial(cached, scale=scale), constrain, axes)(q, k, v, queries[:, 0])


def spread(attend: Callable, constrain: Constrain, axes: Axes) -> Callable:
    """`attend(q, k, v, *of_rows)` on a mesh that splits no keys by their positions."""
    batch, heads, group, _ = axes
    of_queries, of_keys = (batch, None, heads, group), (batch, heads)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *of_rows: jax.Array) -> jax.Array:
        inputs = (of_queries, of_keys, of_keys, *((batch,) for _ in of_rows))
        return constrain.local(attend, inputs, of_queries)(q, k, v, *of_rows)

    return local


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: jax.Array, keys: jax.Array, *, causal: bool, scale: float
) -> jax.Array:
    """Attend from q [B, T, K, G, H] to k, v [B, K, S, H] by JAX's splash kernel, which has a gradient.

    Args:
        queries, keys: int [B, T] and [B, S], segments: a query sees the keys whose number is its own.
        causal: it sees none behind its own position either.
    """
    T, K, G, S = *q.shape[1:4], k.shape[2]
    t, s = block(T), block(S)
    q = padded(rearrange((q * scale).astype(q.dtype), "b t k g h -> b (k g) t h"), t, axis=2)
    k, v = (padded(x, s, axis=2) for x in (k, v))
    segments = splash_attention.SegmentIds(padded(queries, t, axis=1), padded(keys, s, axis=1, fill=-2))
    mask: Any = splash_attention.CausalMask if causal else splash_attention.FullMask
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask((q.shape[2], k.shape[2]))] * (K * G)),
        block_sizes=splash_attention.BlockSizes(
            block_q=t, block_kv=s, block_q_dkv=t, block_kv_dkv=s, block_kv_dkv_compute=s, block_q_dq=t, block_kv_dq=s
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    y: Any = jax.vmap(kernel)(q, k, v, segments)
    return rearrange(y[:, :, :T], "b (k g) t h -> b t k g h", g=G)


def block(n: int) -> int:
    """How many of n positions a block of `splash` has: larger ones are faster, but the last is padded."""
    return min((512, 384, 256, LANES), key=lambda size: -(-n // size) * (size + LANES // 2))


def padded(x: jax.Array, size: int, axis: int, fill: int = 0) -> jax.Array:
    """x with so much `fill` behind that `size` divides its axis."""
    widths = [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)


def cached(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, *, scale: float) -> jax.Array:
    """Attend from q [B, T, K, G, H] to the keys k, v [B, K, S, H] up to each query's position.

    A row's queries stand at positions start [B] and behind. Only those blocks of KEYS positions are read that hold
    something which a query of its block of queries sees.
    """
    B, T, K, G, H = q.shape
    S, rows = k.shape[2], min(QUERIES, T * G + -(T * G) % 16)
    keys = min(KEYS, S)
    q = padded(rearrange(q, "b t k g h -> b k (t g) h"), rows, axis=2)
    blocks = q.shape[2] // rows

    def last(start: jax.Array, i: jax.Array | int) -> jax.Array:
        """The last block of keys that block i of queries sees."""
        end = start + jax.lax.div((i + 1) * rows - 1, G)  # `//` would ask the host what chip this is
        return jax.lax.div(jnp.minimum(end, S - 1), keys)

    own = pl.BlockSpec((None, None, rows, H), lambda b, k, i, j, start: (b, k, i, 0))
    seen = pl.BlockSpec((None, None, keys, H), lambda b, k, i, j, start: (b, k, jnp.minimum(j, last(start[b], i)), 0))
    y = pl.pallas_call(
        functools.partial(_cached, last=last, group=G, scale=scale, length=S),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, blocks, last(start.max(), blocks - 1) + 1),
            in_specs=[own, seen, seen],
            out_specs=own,
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (1, 1, H)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        name="cached_attention",
    )(start, q, k, v)
    return rearrange(y[:, :, : T * G], "b k (t g) h -> b t k g h", g=G)


def _cached(
    start: Any, q: Any, k: Any, v: Any, y: Any, most: Any, total: Any, sums: Any,
    *, last: Callable, group: int, scale: float, length: int,
) -> None:  # fmt: skip
    """A block of queries q [R, H], `group` to a position, meets one of keys and values [S', H].

    Its softmax is made block by block: `most` [R, 1] is the largest score so far, and against it stand `total` [R, 1],
    the sum of weights, and `sums` [R, H], that of weighted values.
    """
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    rows, keys = q.shape[0], k.shape[0]

    @pl.when(j == 0)
    def _() -> None:
        most[...] = jnp.full_like(most, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(j <= last(start[b], i))
    def _() -> None:
        scores = scale * jax.lax.dot_general(
            q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        row = i * rows + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        key = j * keys + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where((key - start[b]) * group <= row, scores, -jnp.inf)
        values = v[...]
        if length % keys:  # behind the end of the cache there may be anything
            position = j * keys + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
            values = jnp.where(position < length, values, 0)
        before, now = most[...], jnp.maximum(most[...], scores.max(axis=-1, keepdims=True))
        weights, kept = jnp.exp(scores - now), jnp.exp(before - now)
        most[...] = now
        total[...] = kept * total[...] + weights.sum(axis=-1, keepdims=True)
        sums[...] = kept * sums[...] + jnp.dot(weights.astype(v.dtype), values, preferred_element_type=jnp.float32)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        y[...] = (sums[...] / total[...]).astype(y.dtype)
