"""What training minimises: cross-entropy of the assistant's tokens, or preferences between pairs of answers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from mllama_jax.generate.decode import normalise
from mllama_jax.model.attention import largest_divisor
from mllama_jax.model.mllama import MllamaModel, Params, call
from mllama_jax.train.batch import IGNORED, Batch

LOGITS_AT_ONCE = 2**27  # of all rows, before they are spread over a mesh


def encode(model: MllamaModel, params: Params, batch: Batch) -> jax.Array:
    """The projected features [I, C, N, D] of the batch's pictures."""
    pixels = normalise(jnp.asarray(batch.pixels), jnp.asarray(batch.ratio_ids))
    return call(model, params, "encode", pixels, batch.ratio_ids)


def log_likelihoods(model: MllamaModel, params: Params, batch: Batch, tiles: jax.Array | None) -> jax.Array:
    """The log-probability of each label, float32 [B, T], 0 where it is IGNORED; `tiles` [B, M, N, D] are what rows see.

    Logits exist for some positions at once only; the backward pass makes them anew.
    """
    rows, length = batch.tokens.shape
    cross = None if tiles is None else call(model, params, "keys_values", tiles, batch.spans)
    positions = jnp.broadcast_to(jnp.arange(length), batch.tokens.shape)
    cache = tuple(dataclasses.replace(each, fresh=True) for each in model.empty_cache(rows, length))
    x, _ = call(model, params, "__call__", batch.tokens, positions, cache, cross)

    @jax.checkpoint
    def some(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, labels = block
        logits = call(model, params, "logits", x)
        found = -optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.where(labels == IGNORED, 0, found)

    t = largest_divisor(length, LOGITS_AT_ONCE // (rows * model.config.text.vocab))
    blocks = (rearrange(x, "b (n t) d -> n b t d", t=t), rearrange(jnp.asarray(batch.labels), "b (n t) -> n b t", t=t))
    return rearrange(jax.lax.map(some, blocks), "n b t -> b (n t)")


def own_tiles(features: jax.Array, rows: int) -> jax.Array | None:
    """Features [I, C, N, D] as the tiles [B, M, N, D] of the rows, which have as many pictures each, in order."""
    return rearrange(features, "(b i) c n d -> b (i c) n d", b=rows) if len(features) else None


def _row_likelihoods(model: MllamaModel, params: Params, batch: Batch) -> jax.Array:
    """`log_likelihoods` of rows that see their own pictures."""
    tiles = own_tiles(encode(model, params, batch), len(batch.tokens)) if len(batch.pixels) else None
    return log_likelihoods(model, params, batch, tiles)


def supervised(model: MllamaModel, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the labels: its sum, and their number."""
    return -_row_likelihoods(model, params, batch).sum(), jnp.sum(batch.labels != IGNORED).astype(jnp.float32)


def preference(
    model: MllamaModel, params: Params, batch: Batch, reference: Params, beta: float
) -> tuple[jax.Array, jax.Array]:
    """Direct preference optimisation (arXiv:2305.18290) on rows that come in pairs, the chosen answer first.

    `-log sigmoid(beta * (gain of the chosen - gain of the rejected))`, a gain being how much likelier an answer is than
    under the `reference` parameters. Returns the sum over pairs and their number; pairs without labels count nothing.
    """
    gains = jnp.sum(
        _row_likelihoods(model, params, batch) - jax.lax.stop_gradient(_row_likelihoods(model, reference, batch)),
        axis=1,
    )  # B
    chosen, rejected = rearrange(gains, "(p two) -> two p", two=2)
    real = jnp.any(rearrange(batch.labels != IGNORED, "(p two) t -> p (two t)", two=2), axis=1)
    losses = -jax.nn.log_sigmoid(beta * (chosen - rejected))
    return jnp.sum(losses * real), jnp.sum(real).astype(jnp.float32)


def cross_entropy(logits: jax.Array, labels: jax.Array | np.ndarray) -> jax.Array:
    """Mean cross-entropy of labels int [...] under logits [..., V], over those that are not IGNORED."""
    counts = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.sum(losses * counts) / jnp.maximum(counts.sum(), 1)
