"""Attention on a TPU, by kernels that write no scores to memory; each device attends with its own rows and heads."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention as splash_attention

LANES = 128  # in a row of a TPU's registers
QUERIES, KEYS = 512, 1024  # of a block, as `cached` reads them
NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: tuple[jax.Array, jax.Array], *, causal: bool, scale: float
) -> jax.Array:
    """Attend from q [B, T, K, G, H] to k, v [B, K, S, H] by the kernel that JAX ships, which has a gradient.

    Args:
        segments: int [B, T] of the queries, int [B, S] of the keys: a query sees the keys of its own segment.
        causal: a query sees no key behind its own position either.
    """
    T, K, G, S = *q.shape[1:4], k.shape[2]
    t, s = block(T), block(S)
    q = padded(rearrange((q * scale).astype(q.dtype), "b t k g h -> b (k g) t h"), t, 2)
    k, v = (padded(x, s, 2) for x in (k, v))
    ids = splash_attention.SegmentIds(padded(segments[0], t, 1), padded(segments[1], s, 1, fill=-3))
    mask: Any = (splash_attention.CausalMask if causal else splash_attention.FullMask)((q.shape[2], k.shape[2]))
    sizes = {"block_q": t, "block_q_dkv": t, "block_q_dq": t, "block_kv_compute": s, "block_kv_dkv_compute": s}
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * (K * G)),
        block_sizes=splash_attention.BlockSizes(**sizes, block_kv=s, block_kv_dkv=s, block_kv_dq=s),
        head_shards=1,
        q_seq_shards=1,
    )
    y = jax.vmap(kernel)(q, k, v, ids)
    return rearrange(y[:, :, :T], "b (k g) t h -> b t k g h", g=G)


def block(n: int) -> int:
    """How many of n positions a block of `splash` has: large ones are faster, but n is padded to a multiple."""
    return min((512, 384, 256, LANES), key=lambda size: -(-n // size) * (size + LANES // 2))


def padded(x: jax.Array, size: int, axis: int, fill: int = 0) -> jax.Array:
    """x with its axis filled up to a multiple of `size`."""
    widths = [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)


def cached(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, *, scale: float) -> jax.Array:
    """Attend from q [B, T, K, G, H], whose rows stand at positions start [B] and behind, to the keys up to each.

    Of a cache k, v [B, K, S, H] only blocks of KEYS positions that hold such keys are read.
    """
    B, T, K, G, H = q.shape
    S, rows = k.shape[2], min(QUERIES, T * G + -(T * G) % 16)
    keys = min(KEYS, S)
    q = padded(rearrange(q, "b t k g h -> b k (t g) h"), rows, 2)
    blocks = q.shape[2] // rows

    def last(start: jax.Array, i: jax.Array | int) -> jax.Array:
        """The last block of keys that block i of queries sees."""
        ends = start + jax.lax.div((i + 1) * rows - 1, G)  # `//` also rounds negative numbers, for which it asks the chip
        return jnp.minimum(jax.lax.div(ends, keys), (S - 1) // keys)

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
            scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (1, 1, H)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        name="cached_attention",
    )(start, q, k, v)
    return rearrange(y[:, :, : T * G], "b k (t g) h -> b t k g h", g=G)


def _cached(start, q, k, v, y, most, total, sums, *, last, group, scale, length) -> None:  # noqa: ANN001
    """A block of queries [R, H] meets one of keys and values [S', H]: softmax over all blocks, from left to right."""
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    rows, keys = q.shape[0], k.shape[0]

    @pl.when(j == 0)
    def _() -> None:
        most[...] = jnp.full_like(most, NEVER)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(j <= last(start[b], i))
    def _() -> None:
        scores = scale * jax.lax.dot_general(q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        row = i * rows + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        key = j * keys + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where((key - start[b]) * group <= row, scores, NEVER)  # a position has `group` rows
        values = v[...]
        if length % keys:  # behind the cache there may be anything
            there = j * keys + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < length
            values = jnp.where(there, values, 0)
        before, now = most[...], jnp.maximum(most[...], scores.max(axis=-1, keepdims=True))
        weights, kept = jnp.exp(scores - now), jnp.exp(before - now)
        most[...] = now
        total[...] = kept * total[...] + weights.sum(axis=-1, keepdims=True)
        sums[...] = kept * sums[...] + jnp.dot(weights.astype(v.dtype), values, preferred_element_type=jnp.float32)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        y[...] = (sums[...] / total[...]).astype(y.dtype)
