"""Prompt lookup: guess what follows from what followed before. Saxena, "Prompt Lookup Decoding" (2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NGRAM = 3  # the most tokens by which a place is found


def guess(tokens: jax.Array, last: jax.Array, k: int) -> jax.Array:
    """What may follow, int32 [B, k], the tokens int [B, S] of which each row's `last` [B] is the last known position.

    It is what followed where the last tokens stood before, as many of them as possible, at the latest such place; a
    text that runs out goes round. Some guess is made where there is none.
    """
    places = jnp.arange(tokens.shape[1])
    alike, length = places < last[:, None], jnp.zeros(tokens.shape, jnp.int32)
    for n in range(NGRAM):
        own = jnp.take_along_axis(tokens, jnp.maximum(last - n, 0)[:, None], axis=1)
        alike &= (jnp.roll(tokens, n, axis=1) == own) & (places >= n)
        length += alike
    place = jnp.argmax(length * len(places) + jnp.where(places < last[:, None], places, -1), axis=1)[:, None]
    period = jnp.maximum(last[:, None] - place, 1)
    return jnp.take_along_axis(tokens, place + 1 + jnp.arange(k) % period, axis=1)
