"""Attention's kernels for a GPU give what XLA gives: interpreted on a CPU, or as far as they can be followed there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllama_jax.model import hopper
from mllama_jax.model.attention import InSpan, UpTo, xla
from mllama_jax.model.gpu_attention import MARKS, by_cudnn, takes
from mllama_jax.model.gpu_decode import single_query
from mllama_jax.model.layers import unconstrained
from mllama_jax.model.quantize import Int8

END = 2**30
SPANS = InSpan(jnp.array([[[2, 9], [4, 7], [0, 0]], [[0, END], [0, END], [3, 5]]]), tokens=7, padded=8)


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32), dtype)


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("case", ["filled to a length", "tiles in spans"])
def test_single_queries_over_int8(case: str, group: int) -> None:
    visible, length = (UpTo(200), 200) if case == "filled to a length" else (SPANS, 24)
    positions = jnp.array([[70], [199]]) if case == "filled to a length" else jnp.array([[5], [4]])
    q, k, v = normal(2, 1, 2, group, 32), normal(2, 2, length, 32, seed=1), normal(2, 2, length, 32, seed=2)
    k, v = Int8.of(k), Int8.of(v)
    ours = single_query(q[:, 0], k, v, visible(positions)[:, 0], 32**-0.5, interpret=True)
    assert float(jnp.abs(ours - xla(q, k, v, positions, visible, 32**-0.5)[:, 0]).max()) <= 1e-5


def test_single_queries_read_nothing_behind_the_last_key() -> None:
    q, k, v = normal(1, 2, 4, 32), normal(1, 2, 300, 32, seed=1), normal(1, 2, 300, 32, seed=2)
    seen = jnp.arange(300)[None] < 70
    k, v = Int8.of(k), Int8.of(v)
    poisoned = Int8(v.values, v.scale.at[:, :, 128:].set(jnp.nan))  # blocks are of 64 keys
    ours = [single_query(q, k, each, seen, 32**-0.5, interpret=True) for each in (v, poisoned)]
    assert bool((ours[0] == ours[1]).all())


def test_marks_say_which_tiles_are_seen() -> None:
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    queries, keys = SPANS.marks(positions, jnp.dtype("bfloat16"), MARKS)
    products = jnp.einsum("btm,bsm->bts", queries.astype("float32"), keys.astype("float32"))
    seen = SPANS(positions)
    assert bool((products[seen] == 0).all())
    assert float(products[~seen].max()) <= -(2**16)


@pytest.mark.parametrize("by", ["cudnn", "flash's gradient"])
def test_cudnn_never_has_a_query_that_sees_nothing(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients of such queries are NaN where a row has two pictures; what it gives for them is zeroed later."""
    masks = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array, **_: object) -> jax.Array:
        masks.append(mask)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    q, k = normal(2, 12, 1, 2, 32), normal(2, 1, 24, 32)
    if by == "cudnn":
        by_cudnn(q, k, k, positions, SPANS, 0.1, unconstrained, ("batch", "kv_heads", "queries", "image_seq"))
    else:
        hopper._by_cudnn(0.1, (q[:, :, 0], k, k), SPANS.marks(positions, q.dtype, MARKS))
    seen = SPANS(positions)
    assert not bool(seen.any(axis=-1).all())
    assert bool((masks[0][:, 0] == (seen | ~seen.any(axis=-1, keepdims=True))).all())


def test_more_tiles_than_marks_are_not_taken() -> None:
    assert takes(InSpan(jnp.zeros((1, MARKS - 1, 2), jnp.int32), 7, 8))
    assert not takes(InSpan(jnp.zeros((1, MARKS, 2), jnp.int32), 7, 8))


@pytest.mark.parametrize(
    ("shapes", "kernels"),
    [
        pytest.param([(1, 6432, 3, 16, 80)], 2, id="vision tower"),
        pytest.param([(8, 6432, 3, 16, 80)], 1, id="vision tower, eight pictures"),
        pytest.param([(2, 104, 32, 128), (2, 8, 6432, 128), (2, 8, 6432, 128)], 1, id="cross-attention"),
    ],
)
def test_the_kernel_is_accepted_for_a_gpu(shapes: list[tuple[int, ...]], kernels: int) -> None:
    """At the 11B's shapes, and lowered once for all layers. The last queries of one picture have their own."""
    arrays = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    rows, keys = shapes[0][:2], shapes[-1][2 if len(shapes) == 3 else 1]
    marks = [jax.ShapeDtypeStruct((rows[0], length, MARKS), "bfloat16") for length in (rows[1], keys)]

    def layers(arrays: list[jax.Array], marks: list[jax.Array]) -> list[jax.Array]:
        return [hopper.flash(tuple(arrays), *marks, scale=0.1 + 0 * i) for i in range(3)]

    text = jax.jit(layers).trace(arrays, marks).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == kernels
