"""int8 weights: what is stored, how close products are, that a quantised model answers as the whole one does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllama_jax
from mllama_jax.cli import SHIPPED
from mllama_jax.errors import InputError
from mllama_jax.model.quantize import product, quantize
from mllama_jax.train.pictures import FAMILIES, conversation, held_out


def test_values_are_within_half_a_step() -> None:
    x = jax.random.normal(jax.random.key(0), (5, 3, 64))
    values, scale = quantize(x)
    assert (values.dtype, scale.shape) == (jnp.int8, (5, 3))
    assert int(jnp.abs(values).max(axis=-1).min()) == 127
    assert float((jnp.abs(values * scale[..., None] - x) / scale[..., None]).max()) <= 0.5 + 1e-4


def test_a_product_is_close_and_exact_in_what_was_quantised() -> None:
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((1, (2, 7, 256)), (2, (2, 12, 256))))
    values, scale = quantize(kernel)
    ours = product("btd,cfd->btcf", x, values, scale)
    own, own_scale = quantize(x)
    same = jnp.einsum("btd,cfd->btcf", own * own_scale[..., None], values * scale[..., None], precision="highest")
    np.testing.assert_allclose(ours, same, atol=1e-4)
    exact = jnp.einsum("btd,cfd->btcf", x, kernel, precision="highest")
    assert float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact)) < 0.02


def test_a_row_of_zeros_stays_zero() -> None:
    values, scale = quantize(jnp.zeros((2, 16)))
    assert not values.any()
    assert np.isfinite(scale).all()


def test_a_quantised_model_answers_like_the_whole_one() -> None:
    whole = mllama_jax.load(SHIPPED, dtype="float32")
    small = mllama_jax.load(SHIPPED, dtype="float32", quantize="int8")
    text = small.params["text"]
    assert {text["layers_0"]["mlp"]["down"]["kernel"].dtype, text["head"]["kernel"].dtype} == {jnp.dtype("int8")}
    assert {text["embedding"].dtype, small.params["projector"]["linear"]["kernel"].dtype} == {jnp.dtype("float32")}
    asked = [conversation(example)[:1] for family in FAMILIES for example in held_out(family, 10)]
    pairs = zip(*(model.generate(asked, max_new_tokens=32) for model in (whole, small)), strict=True)
    assert sum(a.text == b.text for a, b in pairs) >= 0.9 * len(asked)


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(InputError, match="quantize must be int8"):
        mllama_jax.load(SHIPPED, quantize="int3")
