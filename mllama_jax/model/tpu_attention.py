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

from mllama_jax.model.attention import InSpan, UpTo, spread, xla
from mllama_jax.model.layers import Axes, Constrain
from mllama_jax.model.quantize import Int8

MANY = 128  # queries, from which on `over_all` is worth it
QUERIES = 512  # of a block, at most
KEYS = 1024  # of a block of a cache
ALL_KEYS = 2304  # of a block where all are seen, at most


def over_all(
    q: jax.Array,
    k: jax.Array | Int8,
    v: jax.Array | Int8,
    queries: jax.Array | None,
    visible: UpTo | None,
    scale: float,
    constrain: Constrain,
    axes: Axes,
) -> jax.Array:
    """A back end of `attention` for pictures, and for prompts from their beginning: JAX's splash kernel."""
    k, v = (x.widen(q.dtype) if isinstance(x, Int8) else x for x in (k, v))
    return spread(functools.partial(splash, causal=visible is not None, scale=scale), constrain, axes)(q, k, v)


def over_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: jax.Array,
    visible: UpTo | InSpan,
    scale: float,
    constrain: Constrain,
    axes: Axes,
) -> jax.Array:
    """A back end of `attention` for queries at consecutive positions, which reads of a cache only what is filled."""
    spans = visible.of_keys() if isinstance(visible, InSpan) else None
    return spread(functools.partial(cached, scale), constrain, axes)(q, k, v, queries[:, 0], spans)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, scale: float) -> jax.Array:
    """Attend from q [B, T, K, G, H] to k, v [B, K, S, H], or if `causal` to those up to each one's own position."""
    T, K, G, S = *q.shape[1:4], k.shape[2]
    t = block(T, QUERIES)
    s = t if causal else block(S, ALL_KEYS)
    q = padded(rearrange((q * scale).astype(q.dtype), "b t k g h -> b (k g) t h"), t)
    k, v = padded(k, s), padded(v, s)
    queries, keys = jnp.zeros(q.shape[2], jnp.int32), (jnp.arange(k.shape[2]) >= S).astype(jnp.int32)
    segments = splash_attention.SegmentIds(queries, keys)  # a query sees the keys of its own segment: no padding
    mask: Any = splash_attention.CausalMask if causal else splash_attention.FullMask
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask((q.shape[2], k.shape[2]))] * (K * G)),
        block_sizes=splash_attention.BlockSizes(
            block_q=t, block_kv=s, block_q_dkv=t, block_kv_dkv=s, block_kv_dkv_compute=s, block_q_dq=t, block_kv_dq=s
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    y: Any = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)
    return rearrange(y[:, :, :T], "b (k g) t h -> b t k g h", g=G)


def block(n: int, most: int) -> int:
    """Into blocks of how many to divide n positions: few blocks are faster, and so is little padding in the last."""
    return min(range(128, most + 1, 128), key=lambda size: -(-n // size) * (size + 64))


def padded(x: jax.Array, size: int) -> jax.Array:
    """x [B, heads, n, H] with zeros behind, so that `size` divides n."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cached(
    scale: float, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, spans: jax.Array | None
) -> jax.Array:
    """Attend from q [B, T, K, G, H], whose rows stand at positions start [B] and behind, to k, v [B, K, S, H].

    A key is seen by the positions [from, to) of its span, int32 [B, 2, S]; without spans from its own position on. Keys
    are read in blocks, up to the last that a block of queries sees. The gradient is that of `xla`.
    """
    B, T, K, G, H = q.shape
    S, rows = k.shape[2], min(QUERIES, T * G + -(T * G) % 16)
    keys = min(KEYS, S)
    q = padded(rearrange(q, "b t k g h -> b k (t g) h"), rows)
    blocks = q.shape[2] // rows
    if spans is None:
        used = jnp.minimum(start + T, S)
    else:
        used = jnp.where(spans[:, 0] < spans[:, 1], jnp.arange(1, S + 1), 1).max(axis=-1)

    def last(b: Any, i: Any, start: Any, used: Any) -> Any:
        """The last block of keys that block i of queries sees."""
        end = used[b]
        if spans is None:
            end = jnp.minimum(end, start[b] + jax.lax.div((i + 1) * rows - 1, G) + 1)
        return jax.lax.div(end - 1, keys)  # `//` would ask what chip this is

    def of_queries(b: Any, k: Any, i: Any, j: Any, *_: Any) -> tuple:
        return b, k, i, 0

    def of_keys(b: Any, k: Any, i: Any, j: Any, start: Any, used: Any) -> tuple:
        return b, k, jnp.minimum(j, last(b, i, start, used)), 0

    def of_spans(b: Any, k: Any, i: Any, j: Any, start: Any, used: Any) -> tuple:
        return b, 0, jnp.minimum(j, last(b, i, start, used))

    own, seen = pl.BlockSpec((None, None, rows, H), of_queries), pl.BlockSpec((None, None, keys, H), of_keys)
    more = [] if spans is None else [jnp.clip(spans, 0, 2**20)]  # the kernel multiplies them by G
    y = pl.pallas_call(
        functools.partial(_cached, last=last, group=G, scale=scale, length=S),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, blocks, jax.lax.div(used.max() - 1, keys) + 1),
            in_specs=[own, seen, seen, *(pl.BlockSpec((None, 2, keys), of_spans) for _ in more)],
            out_specs=own,
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (1, 1, H)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        name="cached_attention",
    )(start, used, q, k, v, *more)
    return rearrange(y[:, :, : T * G], "b k (t g) h -> b t k g h", g=G)


def _cached(start: Any, used: Any, q: Any, k: Any, v: Any, *refs: Any,
            last: Callable, group: int, scale: float, length: int) -> None:  # fmt: skip
    """A block of queries q [R, H], `group` to a position, meets one of keys and values [S', H].

    Its softmax is made block by block: `most` [R, 1] is the largest score so far, and against it stand `total` [R, 1],
    the sum of weights, and `sums` [R, H], that of weighted values.
    """
    *spans, y, most, total, sums = refs
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    rows, keys = q.shape[0], k.shape[0]

    @pl.when(j == 0)
    def _() -> None:
        most[...] = jnp.full_like(most, jnp.finfo(jnp.float32).min)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(j <= last(b, i, start, used))
    def _() -> None:
        scores = scale * jax.lax.dot_general(
            q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        row = start[b] * group + i * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        key = j * keys + jax.lax.broadcasted_iota(jnp.int32, (1, keys), 1)
        if spans:
            (span,) = spans
            seen = (span[:1] * group <= row) & (row < span[1:] * group) & (key < length)
        else:
            seen = key * group <= row
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        values = v[...]
        if length % keys:  # behind the end of the cache there may be anything
            position = j * keys + jax.lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
            values = jnp.where(position < length, values, 0)
        before, now = most[...], jnp.maximum(most[...], scores.max(axis=-1, keepdims=True))
        weights, kept = jnp.exp(scores - now), jnp.exp(before - now)
        most[...] = now
        total[...] = kept * total[...] + weights.sum(axis=-1, keepdims=True)
        sums[...] = kept * sums[...] + jnp.dot(weights.astype(v.dtype), values, preferred_element_type=jnp.float32)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        y[...] = (sums[...] / total[...]).astype(y.dtype)


def _forward(scale: float, *arrays: Any) -> tuple[jax.Array, tuple]:
    return cached(scale, *arrays), arrays


def _backward(scale: float, arrays: tuple, y: jax.Array) -> tuple:
    q, k, v, start, spans = arrays
    positions = start[:, None] + jnp.arange(q.shape[1])

    def visible(positions: jax.Array) -> jax.Array:
        return (spans[:, :1] <= positions[..., None]) & (positions[..., None] < spans[:, 1:])

    seen = UpTo(k.shape[2]) if spans is None else visible
    _, pull = jax.vjp(lambda q, k, v: xla(q, k, v, positions, seen, scale), q, k, v)
    return *pull(y), None, None


cached.defvjp(_forward, _backward)
