"""The kernel for Hopper GPUs, interpreted on a CPU: what it loads, when, who waits for whom, and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from mllama_jax.model import hopper
from mllama_jax.model.attention import InSpan, xla
from mllama_jax.model.gpu_attention import MARKS, by_flash, within
from mllama_jax.model.layers import Axes, unconstrained
from mllama_jax.model.vision import unseen_by_padding

END = 2**30
AXES: Axes = ("batch", "kv_heads", "queries", "image_seq")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype("bfloat16")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The interpreter knows no products of what is in registers: those are made in plain arithmetic."""

    def add_product(acc: jax.Array, p: jax.Array, v: Any) -> jax.Array:
        return acc + jnp.dot(p.astype("float32"), v[...].astype("float32"))

    def products(acc: jax.Array, p: jax.Array, v: Any, pairs: list, after: Callable) -> tuple[jax.Array, tuple]:
        found = after(hopper._scores(pairs, p.shape[1]))
        return add_product(acc, p, v), found

    for name in "NARROW", "WIDE":  # on two cores more threads than three would wait for each other forever
        monkeypatch.setattr(hopper, name, dataclasses.replace(getattr(hopper, name), groups=2))
    monkeypatch.setattr(hopper, "_add_product", add_product)
    monkeypatch.setattr(hopper, "_products", products)
    force: Any = vars(mosaic_gpu)["force_gpu_interpret_mode"]
    with force():
        yield
    jax.clear_caches()


def near(ours: jax.Array, wanted: jax.Array) -> None:
    """As near as bfloat16 weights of a softmax come."""
    assert float(jnp.abs(ours.astype("float32") - wanted).max()) <= 0.02 * float(jnp.abs(wanted).max())


@pytest.mark.parametrize(
    ("length", "first", "processors", "split"),
    [
        pytest.param(336, 0, 4, True, id="the last queries would have a round of their own"),
        pytest.param(336, 0, 6, False, id="the last queries are in the first round"),
        pytest.param(336, 300, 6, False, id="padding in the last block alone"),
        pytest.param(384, 0, 3, False, id="all blocks are whole"),
    ],
)
def test_pictures(length: int, first: int, processors: int, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of queries and of keys that are not whole, and padding that padding does not see."""
    joined = Mock(wraps=hopper._joined)
    monkeypatch.setattr(hopper, "_joined", joined)
    monkeypatch.setattr(hopper, "PROCESSORS", processors)
    at = jnp.arange(length)
    qkv, padding = normal(1, length, 3, 2, 80), ((at % 5 == 3) & (at >= first))[None]
    q, k, v = (jnp.swapaxes(x, 1, 2).astype("float32") for x in unseen_by_padding(qkv, padding))
    wanted = xla(jnp.swapaxes(q, 1, 2)[:, :, :, None], k, v, None, None, 80**-0.5)[:, :, :, 0, :80]
    near(within(qkv, padding, unconstrained), wanted)
    assert joined.called == split


@pytest.mark.parametrize(("queries", "width"), [(140, 64), (3, 128)])
def test_tiles(queries: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, grouped heads, nested spans, a tile that is not there, padding behind each tile. For three queries
    each tile is a part of the keys, and there are queries that see nothing of a part."""
    monkeypatch.setattr(hopper, "PROCESSORS", 12)
    visible = InSpan(jnp.array([[[0, END], [2, 9], [0, 0]], [[1, END], [1, END], [1, 4]]]), tokens=97, padded=104)
    q, k, v = normal(2, queries, 1, 2, width), normal(2, 1, 312, width, seed=1), normal(2, 1, 312, width, seed=2)
    positions = jnp.broadcast_to(jnp.arange(queries), (2, queries))
    assert visible.spans.shape[1] < MARKS
    ours = by_flash(q, k, v, positions, visible, 0.125, unconstrained, AXES)
    q, k, v = (x.astype("float32") for x in (q, k, v))
    wanted = xla(q, k, v, positions, visible, 0.125)
    sees = np.asarray(visible.tiles(positions).any(axis=-1))
    near(ours[sees], wanted[sees])
