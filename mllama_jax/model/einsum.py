"""The einsum that every product is."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def einsum(equation: str, *operands: jax.Array) -> jax.Array:
    """An einsum in the operands' dtype; a float32 one in true float32, which no accelerator does by default."""
    exact = operands[0].dtype == jnp.float32
    return jnp.einsum(equation, *operands, precision="highest" if exact else "default")
