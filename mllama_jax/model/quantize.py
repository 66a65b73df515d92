"""Numbers in eight and in four bits, with their scales beside them.

The decoder's kernels `[out..., in]` are in int8 with one scale for each output, and activations then quantised token by
token; or in int4, two to a byte, with one scale for each group of inputs, and activations as they are. Caches are in
int8 with a scale for each position and key/value head.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jax.experimental.layout import Format, Layout

from mllama_jax.errors import InputError
from mllama_jax.model.einsum import einsum

# ---- int8 ---------------------------------------------------------------------------------------------------------


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
        return cls(*to_int8(x))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def widen(self, dtype: jnp.dtype) -> jax.Array:
        """The vectors [..., D] in this dtype."""
        return (self.values * self.scale[..., None]).astype(dtype)


def to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., D] as int8 [..., D] and its scales float32 [...]: `x = values * scale`, the largest of each at 127."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), 1e-12) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


LONG = 16384  # inputs from which on a GPU has a product of eight rows sooner than sums for one


def int8_product(equation: str, x: jax.Array, kernel: jax.Array, scale: jax.Array, parts: int) -> jax.Array:
    """`einsum(equation, x, kernel * scale)` of activations x [..., in] that are quantised here.

    They have one scale for a token and each of `parts` equal pieces of `in`; a piece's sums are int32, those of all
    pieces are added in x's dtype. On a mesh that splits `in` so, no scale has to cross it.
    """
    values, own = to_int8(rearrange(x, "... (z i) -> ... z i", z=parts))
    kernel = rearrange(kernel, "... (z i) -> ... z i", z=parts)
    tokens, weights, out = re.split(",|->", equation)
    apart = f"{tokens[:-1]}z{tokens[-1]},{weights[:-1]}z{weights[-1]}->z{out}"
    sums = functools.partial(jnp.einsum, apart, preferred_element_type=jnp.int32)

    def of_eight(values: jax.Array, kernel: jax.Array) -> jax.Array:
        return sums(jnp.pad(values, ((0, 7), *[(0, 0)] * (values.ndim - 1))), kernel)[:, :1]

    if LONG <= x.size == x.shape[-1]:
        y = jax.lax.platform_dependent(values, kernel, cuda=of_eight, default=sums)
    else:
        y = sums(values, kernel)
    own = jnp.moveaxis(own, -1, 0)
    return (y * own.reshape(*own.shape, *(1,) * scale.ndim) * scale).astype(x.dtype).sum(axis=0)


# ---- int4 ---------------------------------------------------------------------------------------------------------

GROUP = 128  # inputs that share a scale, at most
# Scales that are tried, as shares of the one that clips nothing: normal numbers have 0.88 of the squared error that the
# first alone leaves, and 0.68 of that of rounding to -7 ... 7.
SHARES = np.linspace(1, 0.7, 8, dtype=np.float32)


def group_size(inputs: int) -> int:
    """How many inputs share a scale: 128, or where that does not divide them, the largest even number that does."""
    size = max((size for size in range(2, GROUP + 1, 2) if inputs % size == 0), default=None)
    if size is None:
        raise InputError(f"int4: {inputs} inputs of a linear map cannot be packed two to a byte; take int8")
    return size


def to_int4(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., D] as packed integers uint8 [..., D / 2] and scales bfloat16 [..., D / g], one for each group of g.

    An integer lies between -8 and 7, and 8 is added to it. Byte j of a group holds number j in its low half and number
    j + g / 2 in its high half. The number of largest magnitude in a group lies at -8, so that its scale has the
    opposite sign (as in llama.cpp's Q4_0), or is clipped there: the least squares of `SHARES` are taken.
    """
    x = rearrange(x, "... (z g) -> ... z g", g=group_size(x.shape[-1]))
    low, high = (extreme(x, axis=-1).astype(jnp.float32) for extreme in (jnp.min, jnp.max))
    widest = jnp.where(high > -low, high, low) / -8

    def scaled(share: jax.Array) -> jax.Array:
        return jnp.where(widest == 0, 1, share * widest).astype(jnp.bfloat16)

    def error(share: jax.Array) -> jax.Array:
        scale = scaled(share)
        return jnp.square(_integers(x, scale) * scale[..., None] - x).sum(axis=-1)

    shares = jnp.asarray(SHARES)
    scale = scaled(shares[jax.lax.map(error, shares).argmin(axis=0)])
    low, high = jnp.split((_integers(x, scale) + 8).astype(jnp.uint8), 2, axis=-1)
    return rearrange(low | high << 4, "... z h -> ... (z h)"), scale


def _integers(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., z, g] by scales [..., z]: whole numbers in float32."""
    return jnp.clip(jnp.round(x / scale[..., None].astype(jnp.float32)), -8, 7)


def from_int4(packed: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What `to_int4` was given, rounded: uint8 [..., D / 2] and scales [..., D / g] -> [..., D] in this dtype."""
    return rearrange(_halves(packed, scale, dtype), "p ... (z h) -> ... (z p h)", z=scale.shape[-1])


def _halves(packed: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """The numbers in the low halves of bytes, [..., D / 2], and those in the high ones."""
    scale = jnp.repeat(scale.astype(dtype), packed.shape[-1] // scale.shape[-1], axis=-1)
    return [((packed >> shift & 15).astype(dtype) - 8) * scale for shift in (0, 4)]


def int4_product(
    equation: str, x: jax.Array, packed: jax.Array, scale: jax.Array, few_rows: Callable | None = None
) -> jax.Array:
    """`einsum(equation, x, kernel)` of activations x [..., in] and a packed kernel, in x's dtype.

    Args:
        few_rows: what computes it from x, packed and scale for few rows, where there is a kernel for these devices.
    """
    if few_rows is not None:
        return few_rows(x, packed, scale)
    # Else XLA widens all kernels before a loop of decode steps, and holds them.
    x, packed, scale = jax.lax.optimization_barrier((x, packed, scale))
    by_halves = functools.partial(_by_halves, equation)
    if x.size > x.shape[-1]:
        return by_halves(x, packed, scale)
    return jax.lax.platform_dependent(x, packed, scale, tpu=by_halves, default=_of_one_row)


def _by_halves(equation: str, x: jax.Array, packed: jax.Array, scale: jax.Array) -> jax.Array:
    """The products with both halves of the bytes, added: the TPU's compiler unpacks most kernels as it reads them."""
    parts = rearrange(x, "... (z p h) -> p ... (z h)", z=scale.shape[-1], p=2)
    low, high = _halves(packed, scale, x.dtype)
    return einsum(equation, parts[0], low) + einsum(equation, parts[1], high)


def _of_one_row(x: jax.Array, packed: jax.Array, scale: jax.Array) -> jax.Array:
    """Each output as a sum over its bytes: a GPU reads kernels so four times as fast as in XLA's matrix products."""
    row = x.astype(jnp.float32).reshape(scale.shape[-1], 2, -1)  # z 2 h
    low, high = row[:, 0], row[:, 1]
    numbers = rearrange(packed, "... (z h) -> ... z h", z=scale.shape[-1])
    y = jnp.sum(((numbers & 15) * low + (numbers >> 4) * high) * scale[..., None], axis=(-2, -1))
    y -= scale.astype(jnp.float32) @ (8 * row.sum(axis=(1, 2)))  # the 8 that `to_int4` adds
    return y.astype(x.dtype).reshape(*x.shape[:-1], *y.shape)


# ---- Kernels ------------------------------------------------------------------------------------------------------

HEAD, LAYERS = ("text", "head", "kernel"), "-layers"  # what a quantisation with this ending leaves as it is
Quantizer = Callable[..., tuple[jax.Array, jax.Array]]
QUANTIZERS: dict[str, Quantizer] = {"int8": jax.jit(to_int8), "int4": jax.jit(to_int4)}
QUANTIZERS |= {f"{name}{LAYERS}": quantizer for name, quantizer in QUANTIZERS.items()}
_STORED = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)}


def widen(kernel: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A quantised kernel [out..., in] in this dtype."""
    return Int8(kernel, scale).widen(dtype) if kernel.dtype == jnp.int8 else from_int4(kernel, scale, dtype)


def product(
    equation: str, x: jax.Array, kernel: jax.Array, scale: jax.Array, parts: int = 1, few_rows: Callable | None = None
) -> jax.Array:
    """`einsum(equation, x, kernel)` over the last axis of x [..., in] and of a quantised kernel [out..., in].

    On a mesh `in` is split in `parts`; `few_rows` is as in `int4_product`. The gradient of x is that of the product
    with the whole activations, as if rounding were smooth; kernel and scale have none.
    """
    y: Any = _product(equation, parts, few_rows, x, kernel, scale)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    equation: str, parts: int, few_rows: Callable | None, x: jax.Array, kernel: jax.Array, scale: jax.Array
) -> jax.Array:
    if kernel.dtype == jnp.int8:
        return int8_product(equation, x, kernel, scale, parts)
    return int4_product(equation, x, kernel, scale, few_rows)


def _forward(
    equation: str, parts: int, few_rows: Callable | None, x: jax.Array, kernel: jax.Array, scale: jax.Array
) -> tuple[Any, Any]:
    return _product(equation, parts, few_rows, x, kernel, scale), (kernel, scale)


def _backward(
    equation: str, parts: int, few_rows: Callable | None, saved: tuple[jax.Array, jax.Array], y: jax.Array
) -> tuple[jax.Array, None, None]:
    kernel, scale = saved
    inputs, weights, outputs = re.split(",|->", equation)
    return einsum(f"{outputs},{weights}->{inputs}", y, widen(kernel, scale, y.dtype)), None, None


_product.defvjp(_forward, _backward)


def is_quantized(path: tuple[str, ...], quantize: str) -> bool:
    """Whether a parameter is one that `quantize_parameters` changes: a kernel of the decoder, or of its head."""
    return path[0] == "text" and path[-1] == "kernel" and not (path == HEAD and quantize.endswith(LAYERS))


def quantization(dtypes: Mapping[tuple[str, ...], Any]) -> str | None:
    """What the decoder's kernels are quantised to in a model whose parameters have these dtypes, by their paths."""
    found = set(dtypes.values())
    name = next((name for name, dtype in _STORED.items() if dtype in found), None)
    return name if name is None or dtypes.get(HEAD, _STORED[name]) == _STORED[name] else f"{name}{LAYERS}"


def count(leaf: Any) -> int:
    """How many numbers a parameter holds: in int4 two to a byte."""
    return leaf.size * (2 if leaf.dtype == _STORED["int4"] else 1)


def in_order(leaf: Any, platform: str) -> Any:
    """Where a parameter lies and in which order: its sharding, or of a kernel in int4 on a TPU a `Format`.

    There the last outputs lie side by side, as the compiler's unpacking reads them. It would otherwise lay out all
    kernels anew in each dispatch of decode steps, and hold them twice.
    """
    if platform != "tpu" or leaf.dtype != _STORED["int4"]:
        return leaf.sharding
    *outer, out, inputs = range(leaf.ndim)
    return Format(Layout((*outer, inputs, out)), leaf.sharding)


def lay_out(params: Any, platform: str) -> Any:
    """Parameters in the order of `in_order`; those that it changes are given up."""

    def place(leaf: jax.Array) -> jax.Array:
        order = in_order(leaf, platform)
        return jax.device_put(leaf, order, donate=True) if isinstance(order, Format) else leaf

    return jax.tree.map(place, params)


def quantize_parameters(params: dict[str, Any], quantize: str, quantizer: Callable) -> dict[str, Any]:
    """A tree of parameters with quantised kernels in the decoder, each with its `scale` beside; the rest as it is.

    `quantizer` gives both.
    """

    def walk(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                made[name] = walk(leaf, (*path, name))
            elif is_quantized((*path, name), quantize):
                made[name], made["scale"] = quantizer(leaf)
            else:
                made[name] = leaf
        return made

    return walk(params, ())
