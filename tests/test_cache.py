"""Caches in int8: what they hold, what attention makes of it, that rows and slots share them as they do wide ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mllama_jax
from mllama_jax import Mllama, SamplingParams
from mllama_jax.cli import SHIPPED
from mllama_jax.errors import InputError
from mllama_jax.generate import decode, slots
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.engine import Engine
from mllama_jax.generate.requests import Request
from mllama_jax.generate.scheduler import WORTH_A_COPY
from mllama_jax.model.attention import attention, xla
from mllama_jax.model.cache import KVCache
from mllama_jax.model.quantize import Int8
from mllama_jax.processing.chat import Prompt

Draw = Callable[..., Image.Image]
IMAGE = 768


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> Mllama:
    return mllama_jax.load(tiny_directory, dtype="float32", cache="int8")


def rounded(x: np.ndarray) -> np.ndarray:
    """x [..., H] as int8 with one scale for each H keeps it."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.round(x / scale) * scale


@pytest.mark.parametrize("queries", [1, 6])
def test_attention_equals_numpy_on_what_was_written(queries: int) -> None:
    """Written in two runs at each row's own place, read by queries of grouped heads."""
    B, K, G, S, H, written = 3, 2, 4, 32, 16, 7
    rng = np.random.default_rng(queries)
    k, v = (rng.normal(size=(B, written, K, H)).astype(np.float32) for _ in range(2))
    q = rng.normal(size=(B, queries, K, G, H)).astype(np.float32)
    start = np.array([0, 5, 19])
    nothing = jnp.zeros((B, K, S, H))
    cache = KVCache(nothing, nothing).quantized()
    for first, last in ((0, 4), (4, written)):
        new = cache.like(jnp.asarray(k[:, first:last]), jnp.asarray(v[:, first:last]))
        cache = cache.write(new, jnp.asarray(start[:, None] + np.arange(first, last)))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("int8"), jnp.dtype("float32")}

    there = start[:, None] + np.arange(written)
    seen = (np.arange(S) >= start[:, None]) & (np.arange(S) < start[:, None] + written)
    mask = jnp.broadcast_to(jnp.asarray(seen)[:, None], (B, queries, S))
    ours = attention(jnp.asarray(q), cache.k, cache.v, jnp.zeros((B, queries)), lambda _: mask)
    scores = np.einsum("btkgh,bskh->bkgts", q, rounded(k)) * H**-0.5
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, np.einsum("bkgts,bskh->btkgh", weights, rounded(v)), atol=1e-5)
    kept = np.asarray(cache.k.widen(jnp.dtype("float32")))  # pyright: ignore[reportAttributeAccessIssue]
    for b in range(B):
        np.testing.assert_allclose(np.swapaxes(kept[b][:, there[b]], 0, 1), rounded(k[b]), atol=1e-6)
        assert not kept[b][:, ~seen[b]].any()


def test_half_precision_stays_near() -> None:
    """Scales go to scores and weights in float32, so that bfloat16 rounds no more than it does of wide caches."""
    q, k, v = (jax.random.normal(key, (2, 2, 64, 32)) for key in jax.random.split(jax.random.key(0), 3))
    q, small = jnp.swapaxes(q, 1, 2)[:, :1, :, None], KVCache(k, v).quantized()
    exact, ours = (xla(q.astype(dtype), small.k, small.v, None, None, 32**-0.5) for dtype in ("float32", "bfloat16"))
    assert ours.dtype == jnp.bfloat16
    assert float(jnp.abs(exact - ours).max() / jnp.abs(exact).max()) < 0.02


def rows(picture: Draw) -> tuple[list[list[int]], list[list[Image.Image]]]:
    a, b = picture(1), picture(2, 56, 130)
    tokens = [[512, *range(3, 40)], [512, IMAGE, 5], [512, *range(3, 20), IMAGE, IMAGE, 9, 10], [512, 7]]
    return tokens, [[], [a], [b, a], []]


def test_a_row_is_what_it_is_alone(tiny: Mllama, picture: Draw) -> None:
    tokens, images = rows(picture)
    together = tiny.generate_tokens(tokens, images, max_new_tokens=12, stop_ids=())
    for i in (1, 3):
        assert (
            tiny.generate_tokens(tokens[i : i + 1], images[i : i + 1], max_new_tokens=12, stop_ids=())[0] == together[i]
        )


def test_what_is_read_at_once_is_what_is_decoded(tiny: Mllama, picture: Draw) -> None:
    """A prompt sees its own keys as the cache keeps them: logits of the whole say what decode says step by step."""
    tokens, images = rows(picture)
    made = tiny.generate_tokens(tokens, images, max_new_tokens=12, stop_ids=())
    logits = tiny.logits([row + new for row, new in zip(tokens, made, strict=True)], images)
    for b, (row, new) in enumerate(zip(tokens, made, strict=True)):
        assert logits[b, len(row) - 1 : len(row) + len(new) - 1].argmax(axis=-1).tolist() == new


def test_slots_share_what_they_have_read(tiny: Mllama, picture: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that begin alike and show the same pictures: slots are copied, lengthened and read on, answers stay."""
    copied: list[int] = []

    def counting(*args: object) -> slots.Caches:
        copied.append(1)
        return copy_row(*args)

    copy_row = slots.copy_row
    monkeypatch.setattr(slots, "copy_row", counting)
    long, a, b = [512, *range(3, 5 + WORTH_A_COPY)], picture(1), picture(2, 56, 130)
    asked = [([*long, IMAGE, 5], [a]), ([*long, IMAGE, 6], [a]), ([*long, 9], []), ([512, IMAGE, IMAGE, 8], [b, a])]
    serving = Engine(tiny.model, tiny.params, slots=2, context=400)
    answers = []
    for tokens, images in asked:
        answer = Answer(SamplingParams(max_new_tokens=40), (), None)
        serving.submit(Request.of(tiny.config, Prompt(tokens, images), answer))
        answers.append(answer)
        list(serving.step())
    while serving.busy:
        list(serving.step())
    tokens, images = zip(*asked, strict=True)
    assert [answer.tokens for answer in answers] == tiny.generate_tokens(tokens, images, max_new_tokens=40, stop_ids=())
    assert copied
    assert serving.scheduler.counts["image_cache_hits"] >= 2


def test_they_take_half_the_memory() -> None:
    """132 bytes for 128 numbers of bfloat16 at the released models' head width."""
    wide = jnp.zeros((1, 2, 64, 128), jnp.bfloat16)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(Int8.of(wide))) / wide.nbytes == 132 / 256


def test_the_shipped_model_answers_alike() -> None:
    """`mllama compare` says how alike, README by how much; here that int8 caches are not the weights' setting."""
    model = mllama_jax.load(SHIPPED, dtype="bfloat16", cache="int8")
    assert model.params["text"]["layers_0"]["mlp"]["down"]["kernel"].dtype == jnp.bfloat16
    cache = decode.new_cache(model.model, 1, 64)[0]
    assert isinstance(cache.k, Int8)
    with pytest.raises(InputError, match="cache must be int8 or None, got 'int4'"):
        mllama_jax.load(SHIPPED, cache="int4")
