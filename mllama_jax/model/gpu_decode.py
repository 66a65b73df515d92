"""Attention of one query a row over an int8 cache, on a GPU: a Pallas kernel that reads what is filled of it, once.

As in flash-decoding, a row's keys are split among programs, each with a softmax of its own part, and the parts are
weighed against each other at the end. cuDNN has no such kernel, and XLA's products read 1.9 TB/s of an H100's 3.35.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mllama_jax.model.quantize import Int8

KEYS, WARPS, STAGES = 64, 4, 3  # of a step; of a program; of loads on their way
QUERIES = 16  # of a key/value head at most: the fewest rows of a product
PROGRAMS = 1024  # to keep every multiprocessor of a large GPU busy
NEVER = -1e30


def single_query(q: jax.Array, k: Int8, v: Int8, seen: jax.Array, scale: float, interpret: bool = False) -> jax.Array:
    """Attend from q [B, K, G, H], one query a row, to k, v [B, K, S, H]: [B, K, G, H].

    `seen` bool [B, S] says which keys the row's query sees; behind the last of them nothing is read.
    """
    B, K, G, H = q.shape
    S = k.shape[2]
    steps = pl.cdiv(S, KEYS)
    splits = min(pl.cdiv(PROGRAMS, B * K), steps)
    share = pl.cdiv(steps, splits)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, QUERIES - G), (0, 0)))
    filled = jnp.max(jnp.where(seen, jnp.arange(S) + 1, 0), axis=1)
    cache = [
        pl.BlockSpec((None, None, S, H), lambda b, h, i: (b, h, 0, 0)),
        pl.BlockSpec((None, None, S), lambda b, h, i: (b, h, 0)),
    ]
    row = pl.BlockSpec((None, None, None, QUERIES), lambda b, h, i: (b, h, i, 0))
    sums = jax.ShapeDtypeStruct((B, K, splits, QUERIES), jnp.float32)
    y, high, total = pl.pallas_call(
        functools.partial(_part, S, share, scale * math.log2(math.e)),
        grid=(B, K, splits),
        in_specs=[
            pl.BlockSpec((None, None, QUERIES, H), lambda b, h, i: (b, h, 0, 0)),
            pl.BlockSpec((None, S), lambda b, h, i: (b, 0)),
            pl.BlockSpec((None,), lambda b, h, i: (b,)),
            *cache,
            *cache,
        ],
        out_specs=[pl.BlockSpec((None, None, None, QUERIES, H), lambda b, h, i: (b, h, i, 0, 0)), row, row],
        out_shape=[jax.ShapeDtypeStruct((*sums.shape, H), jnp.float32), sums, sums],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
    )(q, seen.astype(jnp.int8), filled, k.values, k.scale, v.values, v.scale)
    weight = jnp.exp2(high - high.max(axis=2, keepdims=True))
    total = (total * weight).sum(axis=2)
    y = (y * weight[..., None]).sum(axis=2) / jnp.maximum(total, 1e-30)[..., None]
    return y[:, :, :G].astype(q.dtype)


def _part(
    length: int, share: int, scale: float,
    q_ref: Any, seen_ref: Any, filled_ref: Any, k_ref: Any, k_scale: Any, v_ref: Any, v_scale: Any,
    y_ref: Any, high_ref: Any, total_ref: Any,
) -> None:  # fmt: skip
    """The softmax of a part of the keys, its largest score and its sum, all in float32."""
    q = q_ref[...]
    first = pl.program_id(2) * share
    last = jnp.minimum(first + share, pl.cdiv(filled_ref[...], KEYS))

    def step(i: jax.Array, carry: tuple) -> tuple:
        y, high, total = carry
        at = pl.ds(i * KEYS, KEYS)
        inside = i * KEYS + jnp.arange(KEYS) < length

        def tile(ref: Any) -> jax.Array:
            return triton.load(ref.at[at, :], mask=inside[:, None], other=0).astype(q.dtype)

        def vector(ref: Any) -> jax.Array:
            return triton.load(ref.at[at], mask=inside, other=0)

        s = jax.lax.dot_general(q, tile(k_ref), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        s *= scale * vector(k_scale)[None]
        s = jnp.where(vector(seen_ref)[None] != 0, s, NEVER)
        new = jnp.maximum(high, s.max(axis=1))
        p, fade = jnp.exp2(s - new[:, None]), jnp.exp2(high - new)
        total = total * fade + p.sum(axis=1)
        part = jnp.dot((p * vector(v_scale)[None]).astype(q.dtype), tile(v_ref), preferred_element_type=jnp.float32)
        return y * fade[:, None] + part, new, total

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(QUERIES, NEVER), jnp.zeros(QUERIES)
    y_ref[...], high_ref[...], total_ref[...] = jax.lax.fori_loop(first, last, step, nothing)
