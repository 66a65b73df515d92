"""int8 weights: what is stored, how close products are, that a quantised model answers as the whole one does."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mllama_jax
from mllama_jax.cli import SHIPPED
from mllama_jax.convert.run import convert
from mllama_jax.convert.verify import verify
from mllama_jax.errors import InputError
from mllama_jax.model.quantize import product, to_int8
from mllama_jax.train.pictures import FAMILIES, conversation, held_out


def test_values_are_within_half_a_step() -> None:
    x = jax.random.normal(jax.random.key(0), (5, 3, 64))
    values, scale = to_int8(x)
    assert (values.dtype, scale.shape) == (jnp.int8, (5, 3))
    assert int(jnp.abs(values).max(axis=-1).min()) == 127
    assert float((jnp.abs(values * scale[..., None] - x) / scale[..., None]).max()) <= 0.5 + 1e-4


def test_a_product_is_close_and_exact_in_what_was_quantised() -> None:
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((1, (2, 7, 256)), (2, (2, 12, 256))))
    values, scale = to_int8(kernel)
    ours = product("btd,cfd->btcf", x, values, scale)
    own, own_scale = to_int8(x)
    same = jnp.einsum("btd,cfd->btcf", own * own_scale[..., None], values * scale[..., None], precision="highest")
    np.testing.assert_allclose(ours, same, atol=1e-4)
    exact = jnp.einsum("btd,cfd->btcf", x, kernel, precision="highest")
    assert float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact)) < 0.02


def test_a_row_of_zeros_stays_zero() -> None:
    values, scale = to_int8(jnp.zeros((2, 16)))
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stored_int8_is_what_loading_makes(dtype: str, small_directory: Path, tmp_path: Path) -> None:
    """To the bit, in half the bytes, and as Orbax itself restores it."""
    report = convert(small_directory, tmp_path / "int8", to="orbax", dtype=dtype, quantize="int8")
    assert report["bytes"] < 0.8 * convert(small_directory, tmp_path / "whole", to="orbax", dtype=dtype)["bytes"]
    stored = mllama_jax.load(tmp_path / "int8", dtype=dtype, verify=True).params
    made = mllama_jax.load(small_directory, dtype=dtype, quantize="int8").params
    assert stored["text"]["layers_0"]["mlp"]["down"]["kernel"].dtype == jnp.int8
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "int8", jax.tree.map(jnp.zeros_like, made))
    for tree in (stored, restored):
        jax.tree.map(np.testing.assert_array_equal, tree, made)


def test_a_flipped_bit_of_a_scale_is_found(small_directory: Path, tmp_path: Path) -> None:
    convert(small_directory, tmp_path / "int8", to="orbax", quantize="int8")
    chunk = next((tmp_path / "int8" / "text.layers_1.mlp.down.scale" / "c").rglob("0"))
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    assert list(verify(tmp_path / "int8")["damaged"]) == ["text.layers_1.mlp.down.scale"]


def test_what_cannot_be_quantised_is_refused(small_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantize must be int8"):
        mllama_jax.load(SHIPPED, quantize="int3")
    with pytest.raises(InputError, match=r"quantize must be int8, and for our layout \(orbax\), got 'int8' for 'hf'"):
        convert(small_directory, tmp_path / "hf", to="hf", quantize="int8")
    convert(small_directory, tmp_path / "int8", to="orbax", quantize="int8")
    with pytest.raises(InputError, match="holds int8 weights already; convert what it was made from"):
        convert(tmp_path / "int8", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()
