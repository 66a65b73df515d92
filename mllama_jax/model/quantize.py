"""int8: vectors with a scale each.

Weights are kernels `[out..., in]` with one scale for each output, and activations are quantised token by token; caches
have a scale for each position and key/value head.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct


@struct.dataclass
class Int8:
    """Vectors in int8: `values * scale`.

    Attributes:
        values: int8 [..., D].
        scale: float32 [...].
    """

    values: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, x: jax.Array) -> Int8:
        """x [..., D], rounded."""
        return cls(*quantize(x))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def widen(self, dtype: jnp.dtype) -> jax.Array:
        """The vectors [..., D] in this dtype."""
        return (self.values * self.scale[..., None]).astype(dtype)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., D] as int8 [..., D] and its scales float32 [...]: `x = values * scale`, the largest of each at 127."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), 1e-12) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def product(equation: str, x: jax.Array, kernel: jax.Array, scale: jax.Array, parts: int = 1) -> jax.Array:
    """`einsum(equation, x, kernel * scale)` over the last axis of x [..., in] and of the int8 kernel [out..., in].

    Activations are quantised here, one scale for a token and each of `parts` equal pieces of `in`; a piece's sums are
    int32, those of all pieces are added in x's dtype. On a mesh that splits `in` so, no scale has to cross it. The
    gradient of x is that of the product with the whole activations, as if rounding were smooth; kernel and scale have
    none.
    """
    y: Any = _product(equation, parts, x, kernel, scale)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, parts: int, x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    values, own = quantize(rearrange(x, "... (z i) -> ... z i", z=parts))
    kernel = rearrange(kernel, "... (z i) -> ... z i", z=parts)
    tokens, weights, out = re.split(",|->", equation)
    apart = f"{tokens[:-1]}z{tokens[-1]},{weights[:-1]}z{weights[-1]}->z{out}"
    y = jnp.einsum(apart, values, kernel, preferred_element_type=jnp.int32)
    own = jnp.moveaxis(own, -1, 0)
    return (y * own.reshape(*own.shape, *(1,) * scale.ndim) * scale).astype(x.dtype).sum(axis=0)


def _forward(equation: str, parts: int, x: jax.Array, kernel: jax.Array, scale: jax.Array) -> tuple[Any, Any]:
    return _product(equation, parts, x, kernel, scale), (kernel, scale)


def _backward(
    equation: str, parts: int, saved: tuple[jax.Array, jax.Array], y: jax.Array
) -> tuple[jax.Array, None, None]:
    kernel, scale = saved
    inputs, weights, outputs = re.split(",|->", equation)
    whole = (kernel * scale[..., None]).astype(y.dtype)
    precision = "highest" if y.dtype == jnp.float32 else "default"
    return jnp.einsum(f"{outputs},{weights}->{inputs}", y, whole, precision=precision), None, None


_product.defvjp(_forward, _backward)


def is_quantized(path: tuple[str, ...]) -> bool:
    """Whether int8 is what `quantize_parameters` stores a parameter in: the kernels of the decoder and of its head."""
    return path[0] == "text" and path[-1] == "kernel"


def quantize_parameters(params: dict[str, Any], quantizer: Callable = quantize) -> dict[str, Any]:
    """A tree of parameters with int8 kernels in the decoder, each with its `scale` beside; the rest as it is."""

    def walk(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                made[name] = walk(leaf, (*path, name))
            elif is_quantized((*path, name)):
                made[name], made["scale"] = quantizer(leaf)
            else:
                made[name] = leaf
        return made

    return walk(params, ())
