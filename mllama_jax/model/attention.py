"""Softmax attention, grouped by key/value head, behind one function."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mllama_jax.model.layers import einsum


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend from q [B, T, K, G, H] to k, v [B, S, K, H] where the bool mask [B, T, S] allows it.

    A query that sees no key gets no meaningful result: callers zero such rows. On a GPU half-precision inputs take
    cuDNN's fused kernel, which never writes the scores to memory.
    """
    if jax.default_backend() == "gpu" and q.dtype != jnp.float32:
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])  # B T K*G H
        y = jax.nn.dot_product_attention(heads, k, v, mask=mask[:, None], implementation="cudnn")
        return y.reshape(q.shape)
    return einsum("bkgts,bskh->btkgh", attention_weights(q, k, mask).astype(v.dtype), v)


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """How much each query of q [B, T, K, G, H] takes of each key of k [B, S, K, H]: float32 [B, K, G, T, S]."""
    scores = einsum("btkgh,bskh->bkgts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
