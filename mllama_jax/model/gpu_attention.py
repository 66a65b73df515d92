"""Attention on a GPU in half precision, by kernels that write no scores to memory; each device attends with its own
rows and heads. They are cuDNN's, and own ones where those leave much of the hardware idle."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from mllama_jax.model.attention import InSpan, UpTo, spread
from mllama_jax.model.layers import Axes, Constrain
from mllama_jax.model.quantize import Int8

MARKS = 16  # features of a mask that `hopper.flash` takes


def takes(visible: InSpan) -> bool:
    """Whether MARKS features are enough to say which tiles are seen."""
    return visible.spans.shape[1] < MARKS


def by_cudnn(
    q: jax.Array,
    k: jax.Array | Int8,
    v: jax.Array | Int8,
    queries: jax.Array | None,
    visible: Callable | None,
    scale: float,
    constrain: Constrain,
    axes: Axes,
) -> jax.Array:
    """A back end of `attention` by cuDNN's fused kernel."""
    seen, causal = (), isinstance(visible, UpTo) and visible.first
    if isinstance(visible, UpTo) and q.shape[1] == 1 and queries is not None:
        seen = (queries[:, 0] + 1,)
    elif not causal and visible is not None and queries is not None:
        seen = (visible(queries),)
    return spread(functools.partial(_cudnn, causal=causal, scale=scale), constrain, axes)(q, k, v, *seen)


def _cudnn(
    q: jax.Array, k: jax.Array | Int8, v: jax.Array | Int8, *seen: jax.Array, causal: bool, scale: float
) -> jax.Array:
    """Attend from q [B, T, K, G, H] to k, v [B, K, S, H].

    Args:
        seen: nothing, for T = 1 how many keys a row sees int [B], or which bool [B, T, S].
    """
    B, T, K, G, _ = q.shape
    k, v = (x.widen(q.dtype) if isinstance(x, Int8) else x for x in (k, v))
    if T == 1:  # a key/value head as a row of its own: the cache stays where it is
        q = rearrange(q, "b t k g h -> (b k) t g h")
        k, v = (rearrange(x, "b k s h -> (b k) s 1 h") for x in (k, v))
        seen = tuple(jnp.repeat(x, K, axis=0) for x in seen)
    else:  # cuDNN wants [rows, S, heads, H]
        q = rearrange(q, "b t k g h -> b t (k g) h")
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    lengths = next((x for x in seen if x.ndim == 1), None)
    mask = next((seeing(x)[:, None] for x in seen if x.ndim == 3), None)
    y = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    if T == 1:
        return rearrange(y, "(b k) t g h -> b t k g h", b=B)
    return rearrange(y, "b t (k g) h -> b t k g h", g=G)


def seeing(mask: jax.Array) -> jax.Array:
    """A mask bool [B, T, S] in which queries that see nothing see all: cuDNN's gradients of such rows are NaN."""
    return mask | ~mask.any(axis=-1, keepdims=True)


def over_int8(
    q: jax.Array,
    k: Int8,
    v: Int8,
    queries: jax.Array,
    visible: Callable,
    scale: float,
    constrain: Constrain,
    axes: Axes,
) -> jax.Array:
    """A back end of `attention` for one query a row over keys and values in int8, by `gpu_decode`."""
    from mllama_jax.model.gpu_decode import single_query

    def attend(q: jax.Array, k: Int8, v: Int8, seen: jax.Array) -> jax.Array:
        return single_query(q[:, 0], k, v, seen, scale)[:, None]

    return spread(attend, constrain, axes)(q, k, v, visible(queries)[:, 0])


def by_flash(
    q: jax.Array,
    k: jax.Array | Int8,
    v: jax.Array | Int8,
    queries: jax.Array,
    visible: InSpan,
    scale: float,
    constrain: Constrain,
    axes: Axes,
) -> jax.Array:
    """A back end of `attention` from many positions to tiles, by `hopper`."""
    from mllama_jax.model.hopper import flash

    def attend(q: jax.Array, k: jax.Array | Int8, v: jax.Array | Int8, mine: jax.Array, theirs: jax.Array) -> jax.Array:
        k, v = (x.widen(q.dtype) if isinstance(x, Int8) else x for x in (k, v))
        heads, mine = (_eights(x) for x in (rearrange(q, "b t k g h -> b t (k g) h"), mine))
        return flash((heads, k, v), mine, theirs, scale=scale)[:, : q.shape[1]].reshape(q.shape)

    return spread(attend, constrain, axes)(q, k, v, *visible.marks(queries, q.dtype, MARKS))


def _eights(x: jax.Array) -> jax.Array:
    """x [B, T, ...] with T made a multiple of 8, in which the kernel loads rows."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), *((0, 0),) * (x.ndim - 2)))


def within(qkv: jax.Array, padding: jax.Array, constrain: Constrain) -> jax.Array:
    """Attention within qkv [I, S, 3, heads, H] of pictures, by `hopper`: [I, S, heads, H].

    Padding bool [I, S] gives padding no weight: an outer product, so that one feature says it.
    """
    from mllama_jax.model.hopper import flash

    mark = jnp.pad(jnp.where(padding, 2.0**8, 0).astype(qkv.dtype)[..., None], ((0, 0), (0, 0), (0, MARKS - 1)))
    inputs = ("images", None, None, "vision_heads"), ("images",), ("images",)

    def attend(qkv: jax.Array, *marks: jax.Array) -> jax.Array:
        return flash((qkv,), *marks, scale=qkv.shape[-1] ** -0.5)

    return constrain.local(attend, inputs, ("images", None, "vision_heads"))(qkv, -mark, mark)
