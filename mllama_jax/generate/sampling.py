"""How the next token is chosen: settings for each row, and pure functions on logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mllama_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Settings of one row.

    Attributes:
        max_new_tokens: how many tokens to make at most.
        temperature: 0 takes the likeliest token and draws no random number.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities reach p.
        seed: of the row's random numbers, which no other row influences.
        stop_ids: tokens that end the row; None takes the model's own.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        def require(field: str, fits: bool, expected: str) -> None:
            if not fits:
                raise InputError(f"{field} must be {expected}, got {getattr(self, field)!r}")

        for field in ("temperature", "top_p"):
            value = getattr(self, field)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(field, number and math.isfinite(value), "a finite number")
        for field, least in (("max_new_tokens", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, field)
            require(field, isinstance(value, int) and not isinstance(value, bool), "an integer")
            require(field, value >= least, f"at least {least}")
        require("seed", self.seed < 2**32, "below 2**32")
        require("temperature", self.temperature >= 0, "at least 0")
        require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")


@struct.dataclass
class Settings:
    """The settings of all rows as arrays [B]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    limit: jax.Array

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> Settings:
        def column(field: str, dtype: type) -> jax.Array:
            return jnp.asarray(np.array([getattr(row, field) for row in rows], dtype))

        return cls(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            seed=column("seed", np.uint32),
            limit=column("max_new_tokens", np.int32),
        )


def sample(logits: jax.Array, settings: Settings, step: jax.Array) -> jax.Array:
    """Choose a token for each row.

    Args:
        logits: float32 [B, V].
        step: int32 [B], how many tokens each row has made; with its seed it determines the row's random numbers.

    Returns:
        int32 [B].
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        order = jnp.argsort(logits, axis=-1, descending=True)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / jnp.maximum(settings.temperature, 1e-6)[:, None]
        ranked = jnp.where(kept(ranked, settings), ranked, -jnp.inf)
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(settings.seed, step)
        choice = jax.vmap(jax.random.categorical)(keys, ranked)
        token = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
        return jnp.where(settings.temperature > 0, token, greedy)

    return jax.lax.cond(jnp.any(settings.temperature > 0), drawn, lambda: greedy)


def kept(ranked: jax.Array, settings: Settings) -> jax.Array:
    """Which of the logits [B, V], falling along V, the rows' top-k and then top-p keep: bool [B, V], never none."""
    rank = jnp.arange(ranked.shape[-1])
    top_k = (settings.top_k[:, None] == 0) | (rank < settings.top_k[:, None])
    probabilities = jax.nn.softmax(jnp.where(top_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return top_k & ((before < settings.top_p[:, None]) | (rank == 0))
