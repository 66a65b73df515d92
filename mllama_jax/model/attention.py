"""Softmax attention, grouped by key/value head, behind one function."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from mllama_jax.model.layers import einsum

SCORES_AT_ONCE = 2**28  # of all rows and heads, before they are spread over a mesh


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: jax.Array, visible: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Attend from q [B, T, K, G, H] to k, v [B, S, K, H].

    Scores and softmax are float32. A query that sees no key gets no meaningful result: callers zero such rows.
    Long inputs go block by block of queries, so that neither scores nor mask ever exist for all T x S pairs. On a GPU
    half-precision inputs take cuDNN's fused kernel, which never writes the scores to memory.

    Args:
        queries: [B, T], what `visible` has to know of each query, such as its position.
        visible: from `queries` [B, t] of some of the T to the keys that these may see, bool [B, t, S].
    """
    if jax.default_backend() == "gpu" and q.dtype != jnp.float32:
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])  # B T K*G H
        mask = visible(queries)[:, None]
        return jax.nn.dot_product_attention(heads, k, v, mask=mask, implementation="cudnn").reshape(q.shape)

    def attend(q: jax.Array, queries: jax.Array) -> jax.Array:
        scores = einsum("btkgh,bskh->bkgts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        scores = jnp.where(visible(queries)[:, None, None], scores, jnp.finfo(jnp.float32).min)
        return einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)

    B, T, K, G, _ = q.shape
    t = largest_divisor(T, SCORES_AT_ONCE // (B * K * G * k.shape[1]))
    if t == T:
        return attend(q, queries)
    blocks = rearrange(q, "b (n t) k g h -> n b t k g h", t=t), rearrange(queries, "b (n t) -> n b t", t=t)
    return rearrange(jax.lax.map(lambda block: attend(*block), blocks), "n b t k g h -> b (n t) k g h")


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`; 1 where there is none."""
    return next((d for d in range(min(n, most), 0, -1) if n % d == 0), 1)
