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
    """Attend from q [B, T, K, G, H] to k, v [B, K, S, H].

    A query that sees no key gets no meaningful result: callers zero such rows. Long inputs go block by block of
    queries, so that neither scores nor mask ever exist for all T x S pairs. On a GPU half-precision inputs take cuDNN's
    fused kernel, which never writes the scores to memory.

    Args:
        queries: [B, T], what `visible` has to know of each query, such as its position.
        visible: from `queries` [B, t] of some of the T to the keys that these may see, bool [B, t, S].
    """
    if jax.default_backend() == "gpu" and q.dtype != jnp.float32:
        return _cudnn(q, k, v, visible(queries))

    def attend(q: jax.Array, queries: jax.Array) -> jax.Array:
        return einsum("bkgts,bksh->btkgh", attention_weights(q, k, visible(queries)).astype(v.dtype), v)

    B, T, K, G, _ = q.shape
    t = largest_divisor(T, SCORES_AT_ONCE // (B * K * G * k.shape[2]))
    if t == T:
        return attend(q, queries)
    blocks = rearrange(q, "b (n t) k g h -> n b t k g h", t=t), rearrange(queries, "b (n t) -> n b t", t=t)
    return rearrange(jax.lax.map(lambda block: attend(*block), blocks), "n b t k g h -> b (n t) k g h")


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """How much each query of q [B, T, K, G, H] takes of each key of k [B, K, S, H]: float32 [B, K, G, T, S].

    The bool mask is [B, T, S]; scores and softmax are float32.
    """
    scores = einsum("btkgh,bksh->bkgts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """cuDNN wants its keys [rows, S, heads, H]."""
    B, T, K, G, _ = q.shape
    if T == 1:  # a key/value head as a row of its own: the cache stays where it is
        q = rearrange(q, "b t k g h -> (b k) t g h")
        k, v = (rearrange(x, "b k s h -> (b k) s 1 h") for x in (k, v))
        mask = jnp.repeat(mask, K, axis=0)
    else:
        q = rearrange(q, "b t k g h -> b t (k g) h")
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    if T == 1:
        return rearrange(y, "(b k) t g h -> b t k g h", b=B)
    return rearrange(y, "b t (k g) h -> b t k g h", g=G)


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`; 1 where there is none."""
    return next((d for d in range(min(n, most), 0, -1) if n % d == 0), 1)
