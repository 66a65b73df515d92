"""Attention's kernels for a TPU, interpreted on a CPU, give what XLA gives; each is chosen where it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mllama_jax.model import tpu_attention
from mllama_jax.model.attention import InSpan, UpTo, attention, back_end, xla
from mllama_jax.model.gpu_attention import by_cudnn, over_int8
from mllama_jax.model.layers import Unconstrained
from mllama_jax.model.quantize import Int8
from mllama_jax.model.tpu_attention import over_all, over_cache
from mllama_jax.model.vision import unseen_by_padding

AXES = ("batch", "kv_heads", "queries", "seq")
END = 2**30


class On(Unconstrained):
    """One device of a platform, whose caches may be split by position."""

    def __init__(self, platform: str, cache: int = 1):
        self._platform, self.cache = platform, cache

    @property
    def platform(self) -> str:
        return self._platform

    def parts(self, name: str | None) -> int:
        return self.cache if name == "cache" else 1


@contextmanager
def interpretation() -> Iterator[None]:
    anyhow: Any = True
    with pltpu.force_tpu_interpret_mode(anyhow):
        yield


def interpreted(kernel: Callable, q: jax.Array, k: jax.Array, v: jax.Array, *args: Any) -> jax.Array:
    with interpretation():
        return jax.jit(lambda *qkv: kernel(*qkv, *args, On("tpu"), AXES))(q, k, v)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def inputs(T: int, S: int, H: int = 16, G: int = 4) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v of two rows and two key/value heads."""
    return normal(2, T, 2, G, H), normal(2, 2, S, H, seed=1), normal(2, 2, S, H, seed=2)


def consecutive(*start: int, T: int) -> jax.Array:
    return jnp.asarray(start)[:, None] + jnp.arange(T)


# Pictures of two tiles, of one that stands behind, and of one apart; none; 21 of the 24 keys of a tile are real.
SPANS = InSpan(jnp.asarray([[[3, 90], [3, 90], [4, 90], [90, END]], [[0, 0]] * 4]), 21, 24)

Case = tuple[Callable, tuple[int, int], jax.Array | None, Any]
CASES: dict[str, Case] = {
    "all keys, in blocks that these do not fill": (over_all, (300, 530), None, None),
    "a prompt from its beginning": (over_all, (200, 200), consecutive(0, 0, T=200), UpTo(200, first=True)),
    "text to tiles": (over_cache, (150, 96), consecutive(0, 0, T=150), SPANS),
    "a later part of a prompt": (over_cache, (130, 500), consecutive(0, 256, T=130), UpTo(500)),
    "one token a row to tiles": (over_cache, (1, 96), consecutive(95, 9, T=1), SPANS),
    "one token a row": (over_cache, (1, 512), consecutive(5, 511, T=1), UpTo(512)),
    "a few tokens across blocks": (over_cache, (3, 512), consecutive(127, 254, T=3), UpTo(512)),
    "a short cache": (over_cache, (1, 100), consecutive(3, 99, T=1), UpTo(100)),
}


def both(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel gives and what XLA gives in float32, where a query sees anything."""
    kernel, (T, S), queries, visible = case
    for name in ("KEYS", "ALL_KEYS"):
        monkeypatch.setattr(tpu_attention, name, 128)
    q, k, v = (x.astype(dtype) for x in inputs(T, S))
    ours = interpreted(kernel, q, k, v, queries, visible, 0.25)
    assert ours.dtype == dtype
    wanted = jax.jit(lambda q, k, v: xla(q, k, v, queries, visible, 0.25))(*(x.astype("float32") for x in (q, k, v)))
    sees = np.ones((2, T), bool) if visible is None or queries is None else visible(queries).any(axis=-1)
    return np.asarray(ours, np.float32)[sees], np.asarray(wanted)[sees]


@pytest.mark.parametrize("name", CASES)
def test_equals_xla_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, wanted = both(CASES[name], "float32", monkeypatch)
    assert len(ours)
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["a prompt from its beginning", "text to tiles", "one token a row"])
def test_stays_near_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near as XLA's own half precision: within 2% of the largest number."""
    ours, wanted = both(CASES[name], "bfloat16", monkeypatch)
    assert np.abs(ours - wanted).max() <= 0.02 * np.abs(wanted).max()


def test_padding_gives_padding_no_weight() -> None:
    """The vision tower's mask, a feature of queries and keys, at its own head width."""
    qkv, padding = normal(1, 200, 3, 2, 80), (jnp.arange(200) > 150)[None]
    q, k, v = (jnp.swapaxes(each, 1, 2) for each in unseen_by_padding(qkv, padding))
    q = jnp.swapaxes(q, 1, 2)[:, :, :, None]
    ours = interpreted(over_all, q, k, v, None, None, 80**-0.5)
    both_padding = padding[:, :, None] & padding[:, None]
    wanted = xla(q[..., :80], k[..., :80], v[..., :80], padding, lambda _: ~both_padding, 80**-0.5)
    np.testing.assert_allclose(ours[..., :80], wanted, atol=1e-5)


@pytest.mark.parametrize(
    "visible", [UpTo(512), InSpan(jnp.asarray([[[0, END]] + [[0, 0]] * 3, [[0, END]] * 3 + [[0, 0]]]), 120, 128)]
)
def test_of_a_cache_only_what_is_filled_is_read(visible: UpTo | InSpan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that no query sees may hold anything: one of the rows fills one block of four, the other three."""
    monkeypatch.setattr(tpu_attention, "KEYS", 128)
    q, k, v = inputs(1, 512)
    positions = consecutive(100, 300, T=1)
    wanted = xla(q, k, v, positions, visible, 0.25)
    unfilled = (jnp.arange(512) >= jnp.asarray([128, 384])[:, None])[:, None, :, None]
    k, v = (jnp.where(unfilled, jnp.nan, x) for x in (k, v))
    np.testing.assert_allclose(interpreted(over_cache, q, k, v, positions, visible, 0.25), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["a prompt from its beginning", "text to tiles"])
def test_gradients_equal_those_of_xla(name: str) -> None:
    kernel, (T, S), queries, visible = CASES[name]
    assert queries is not None
    sees = visible(queries).any(axis=-1)[:, :, None, None, None]
    arrays = (*inputs(T, S), normal(2, T, 2, 4, 16, seed=3))

    def loss(back_end: Callable, *others: Any) -> Callable:
        return lambda q, k, v, w: (back_end(q, k, v, queries, visible, 0.25, *others) * w * sees).sum()

    with interpretation():
        found = jax.jit(jax.grad(loss(kernel, On("tpu"), AXES), (0, 1, 2)))(*arrays)
    for ours, wanted in zip(found, jax.jit(jax.grad(loss(xla), (0, 1, 2)))(*arrays), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_the_choice_follows_platform_and_shape() -> None:
    def chosen(
        platform: str,
        T: int,
        visible: Callable | None,
        dtype: str = "bfloat16",
        parts: int = 1,
        small: bool = False,
        group: int = 1,
    ) -> Any:
        keys = jnp.zeros((1, 1, 256, 16), dtype)
        q, k = jnp.zeros((1, T, 1, group, 16), dtype), Int8.of(keys) if small else keys
        found: Any = back_end(q, k, visible, On(platform, parts), ("batch", "kv_heads", "queries", "cache"))
        return getattr(found, "func", found)

    prompt, later = UpTo(256, first=True), UpTo(256)
    assert chosen("cpu", 256, None) is chosen("cpu", 1, later) is xla
    assert chosen("gpu", 256, None) is chosen("gpu", 1, later) is by_cudnn
    assert chosen("gpu", 1, later, small=True) is over_int8
    assert chosen("gpu", 1, later, small=True, group=17) is by_cudnn
    assert chosen("tpu", 256, None) is chosen("tpu", 256, prompt) is over_all
    assert chosen("tpu", 256, prompt, small=True) is over_all
    for each in (later, SPANS):
        assert chosen("tpu", 1, each) is chosen("tpu", 256, each) is over_cache
        assert chosen("tpu", 1, each, small=True) is chosen("tpu", 256, each, small=True) is xla
    assert chosen("tpu", 8, prompt) is xla
    assert chosen("tpu", 256, lambda _: jnp.ones((1, 256, 256), bool)) is xla
    assert chosen("tpu", 1, later, parts=2) is xla
    for platform in ("cpu", "gpu", "tpu"):
        assert chosen(platform, 256, None, "float32") is chosen(platform, 1, later, "float32") is xla


def test_attention_runs_what_is_chosen() -> None:
    """Keys in int8 are widened where they are all read."""
    q, k, v = (x.astype("bfloat16") for x in inputs(200, 200))
    queries, visible = CASES["a prompt from its beginning"][2:]
    with interpretation():
        run = jax.jit(lambda q, k, v: attention(q, k, v, queries, visible, constrain=On("tpu")))
        ours = run(q, Int8.of(k), Int8.of(v))
    wanted = attention(q.astype("float32"), k, v, queries, visible)
    assert float(jnp.abs(ours - wanted).max()) <= 0.03 * float(jnp.abs(wanted).max())
