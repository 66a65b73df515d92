"""int8 and int4 weights: what is stored, how close products are, that a quantised model answers as the whole one."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AbstractMesh

import mllama_jax
from mllama_jax.cli import SHIPPED
from mllama_jax.config import PRESETS
from mllama_jax.convert.run import convert
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.convert.verify import verify
from mllama_jax.errors import InputError
from mllama_jax.model import layers
from mllama_jax.model.hopper_int4 import Plan, for_rows
from mllama_jax.model.layers import Unconstrained
from mllama_jax.model.mllama import abstract_parameters
from mllama_jax.model.quantize import QUANTIZERS, count, product, to_int4, to_int8, widen
from mllama_jax.sharding.rules import Rules
from mllama_jax.train.pictures import FAMILIES, conversation, held_out

STORED = {"int8": "int8", "int4": "uint8"}


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


@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (352, 88)])
def test_int4_is_packed_by_halves_of_groups(inputs: int, group: int) -> None:
    """Every number is the nearest to it that its group's scale allows: unpacked here as kernels of others would."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (5, 3, inputs)))
    packed, scale = map(np.asarray, to_int4(jnp.asarray(x)))
    assert (packed.dtype, packed.shape) == (np.uint8, (5, 3, inputs // 2))
    assert (scale.dtype, scale.shape) == (jnp.bfloat16, (5, 3, inputs // group))
    halves = packed.reshape(5, 3, -1, group // 2)
    numbers = np.concatenate([halves & 15, halves >> 4], axis=-1).astype(np.float32) - 8
    steps = scale.astype(np.float32)[..., None]
    nearest = np.clip(np.round(x.reshape(numbers.shape) / steps), -8, 7)
    np.testing.assert_array_equal(numbers, nearest)
    wide = widen(jnp.asarray(packed), jnp.asarray(scale), jnp.dtype("float32"))
    np.testing.assert_array_equal(wide, (numbers * steps).reshape(x.shape))


def test_int4_scales_are_those_of_least_squares() -> None:
    """On no group worse than the scale that clips nothing, and on all a sixth better than symmetric rounding."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (2000, 128)))
    ours = np.square(np.asarray(widen(*to_int4(jnp.asarray(x)), jnp.dtype("float32"))) - x).sum(axis=1)
    largest = x[np.arange(len(x)), np.abs(x).argmax(axis=1)]
    plain = np.square(np.clip(np.round(x / (largest / -8)[:, None]), -8, 7) * (largest / -8)[:, None] - x).sum(axis=1)
    step = (np.abs(largest) / 7)[:, None]
    symmetric = np.square(np.round(x / step) * step - x).sum(axis=1)
    assert (ours <= 1.05 * plain).all()  # the scale that clips nothing is rounded to bfloat16 here
    assert ours.sum() < (5 / 6) ** 2 * symmetric.sum()


@pytest.mark.parametrize("parts", [1, 4])
def test_a_gpu_has_a_long_int8_product_of_one_row_as_of_eight(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((1, (1, 1, 16384)), (2, (2, 12, 16384))))
    of_one = functools.partial(product, "btd,cfd->btcf", parts=parts)
    run = jax.export.export(jax.jit(of_one), platforms=["cuda"])(x, *to_int8(kernel))
    assert f"tensor<8x1x{parts}x{16384 // parts}xi8>" in run.mlir_module()
    wanted = of_one(x, *to_int8(kernel))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cuda, default: cuda(*arrays))
    np.testing.assert_array_equal(of_one(x, *to_int8(kernel)), wanted)


@pytest.mark.parametrize("rows", [(2, 7), (1, 1)])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 0.01)])
def test_an_int4_product_is_that_of_what_was_packed(dtype: str, error: float, rows: tuple[int, int]) -> None:
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((1, (*rows, 512)), (2, (2, 12, 512))))
    x = x.astype(dtype)
    packed, scale = to_int4(kernel)
    ours = product("btd,cfd->btcf", x, packed, scale)
    wanted = np.einsum("btd,cfd->btcf", x.astype(jnp.float32), widen(packed, scale, jnp.dtype("float32")))
    assert ours.dtype == dtype
    assert np.linalg.norm(ours.astype(jnp.float32) - wanted) < error * np.linalg.norm(wanted)


@pytest.mark.parametrize(("platform", "dots"), [("tpu", 2), ("cuda", 1)])
def test_a_gpu_reads_int4_kernels_by_sums_for_one_row(platform: str, dots: int) -> None:
    """The one product that is left there is of the scales."""
    shapes = ((1, 1, 512), jnp.bfloat16), ((12, 256), jnp.uint8), ((12, 4), jnp.bfloat16)
    run = jax.jit(lambda *arrays: product("btd,fd->btf", *arrays))
    text = jax.export.export(run, platforms=[platform])(*itertools.starmap(jax.ShapeDtypeStruct, shapes)).mlir_module()
    assert text.count("stablehlo.dot_general") == dots


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "dtype", "kernels"),
    [
        ((1, 1), 512, 64, "bfloat16", 1),
        ((8, 4), 512, 64, "bfloat16", 1),
        ((3, 11), 512, 64, "bfloat16", 0),  # more rows
        ((1, 1), 352, 64, "bfloat16", 0),  # groups of 88
        ((1, 1), 512, 96, "bfloat16", 0),  # a warpgroup and a half
        ((1, 1), 512, 64, "float16", 0),
    ],
)
def test_a_hopper_gpu_has_a_kernel_for_few_rows_over_int4(
    rows: tuple[int, int], inputs: int, outputs: int, dtype: str, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowered once for all layers."""
    monkeypatch.setattr(layers, "on_hopper", lambda *_: True)
    linear = layers.Linear("btd,cfd->btcf", (2, outputs // 2, inputs), (None, "mlp", "embed"))
    params = jax.eval_shape(lambda: dict(zip(("kernel", "scale"), to_int4(jnp.ones(linear.shape)), strict=True)))

    def several(params: dict[str, jax.Array], x: jax.Array) -> list[jax.Array]:
        return [jnp.asarray(linear.apply({"params": params}, x + i)) for i in range(3)]

    traced = jax.jit(several).trace(params, jax.ShapeDtypeStruct((*rows, inputs), dtype))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == kernels


@pytest.mark.parametrize(
    ("rows", "inputs", "table", "taken"),
    [
        pytest.param(4, 512, {"batch": "data", "mlp": "model"}, True, id="rows and kernels"),
        pytest.param(3, 512, {"batch": "data", "mlp": "model"}, False, id="rows that do not divide"),
        pytest.param(4, 128, {"batch": "data", "mlp": "model"}, False, id="half a group"),
        pytest.param(4, 512, {"batch": "data", "mlp": "data"}, False, id="one axis for both"),
    ],
)
def test_meshes_of_hopper_gpus_whose_parts_a_kernel_takes(
    rows: int, inputs: int, table: dict[str, str], taken: bool
) -> None:
    rules = Rules.of(AbstractMesh((2, 2), ("data", "model")), table)
    x, scale = jnp.zeros((rows, 1, inputs), "bfloat16"), jnp.zeros((64, inputs // 128), "bfloat16")
    found: Any = for_rows(x, scale, (None, "mlp"), rules)
    assert (found is not None) == taken


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize(("width", "hidden", "heads"), [(4096, 14336, 32), (8192, 28672, 64)])
def test_blocks_fill_a_hopper_gpu(width: int, hidden: int, heads: int, parts: int) -> None:
    """The 11B's and the 90B's kernels, also over several: all their inputs, and no splits for a second round."""
    out = 2 * hidden, width, heads * 128, 2 * 8 * 128, 128256
    maps = [(each // parts, width) for each in out] + [(width, each // parts) for each in (hidden, heads * 128)]
    for outputs, inputs in maps:
        if outputs % 64 == 0:  # not the head's over eight
            plan = Plan.of(outputs, inputs // 128)
            blocks = outputs // plan.outputs * plan.splits
            assert outputs % plan.outputs == 0
            assert plan.groups * plan.splits * plan.steps * 128 == inputs
            assert blocks <= 132 or plan.splits == 1
            assert blocks >= 96 or parts > 1


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_a_row_of_zeros_stays_zero(quantize: str) -> None:
    values, scale = QUANTIZERS[quantize](jnp.zeros((2, 16)))
    assert not widen(values, scale, jnp.dtype("float32")).any()
    assert np.isfinite(scale.astype(jnp.float32)).all()


@pytest.fixture(scope="module")
def answers() -> list[str]:
    return answered(mllama_jax.load(SHIPPED, dtype="float32"))


def answered(model: mllama_jax.Mllama) -> list[str]:
    asked = [conversation(example)[:1] for family in FAMILIES for example in held_out(family, 10)]
    return [completion.text for completion in model.generate(asked, max_new_tokens=32)]


@pytest.mark.parametrize(("quantize", "stored"), STORED.items())
def test_a_quantised_model_answers_like_the_whole_one(quantize: str, stored: str, answers: list[str]) -> None:
    small = mllama_jax.load(SHIPPED, dtype="float32", quantize=quantize)
    text = small.params["text"]
    assert {text["layers_0"]["mlp"]["down"]["kernel"].dtype, text["head"]["kernel"].dtype} == {jnp.dtype(stored)}
    assert {text["embedding"].dtype, small.params["projector"]["linear"]["kernel"].dtype} == {jnp.dtype("float32")}
    assert sum(a == b for a, b in zip(answers, answered(small), strict=True)) >= 0.9 * len(answers)


def test_on_a_tpu_packed_kernels_lie_as_its_compiler_reads_them(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side lie outputs, not inputs, and the numbers are the same."""
    tokens = [[512, 5, 6, 7]]
    plain = mllama_jax.load(tiny_directory, dtype="float32", quantize="int4")
    monkeypatch.setattr(Unconstrained, "platform", "tpu")
    ours = mllama_jax.load(tiny_directory, dtype="float32", quantize="int4")
    order = {leaf.format.layout.major_to_minor for leaf in jax.tree.leaves(ours.params) if leaf.dtype == jnp.uint8}
    assert order == {(1, 0), (0, 2, 1), (0, 1, 3, 2)}
    jax.tree.map(np.testing.assert_array_equal, ours.params, plain.params)
    np.testing.assert_allclose(ours.logits(tokens, [[]]), plain.logits(tokens, [[]]), atol=1e-5)
    first, second = (model.generate_tokens(tokens, [[]], max_new_tokens=8) for model in (ours, plain))
    assert first == second


def test_the_11b_in_int4_is_below_8_gb() -> None:
    """Vision tower and embedding table in bfloat16, all other kernels in half a byte and a scale for 128 numbers."""
    tree = nn.unbox(abstract_parameters(PRESETS["11b-instruct"], "bfloat16", "int4"))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) < 8e9
    down, head = tree["text"]["layers_0"]["mlp"]["down"], tree["text"]["head"]
    assert count(down["kernel"]) == 4096 * 14336
    for each in (down, head):
        assert each["scale"].size * 128 == count(each["kernel"])


@pytest.mark.parametrize("quantize", ["int8-layers", "int4-layers"])
def test_the_head_is_a_choice(quantize: str, tiny_directory: Path, tmp_path: Path) -> None:
    """Left as it is it has no scale, in what is loaded and in what is stored; layers are those of the other choice."""
    made = mllama_jax.load(tiny_directory, dtype="bfloat16", quantize=quantize).params
    text = dict(made["text"])
    both = mllama_jax.load(tiny_directory, dtype="bfloat16", quantize=quantize.removesuffix("-layers")).params["text"]
    whole = mllama_jax.load(tiny_directory, dtype="bfloat16").params["text"]
    assert set(text["head"]) == {"kernel"}
    np.testing.assert_array_equal(text["head"]["kernel"], whole["head"]["kernel"])
    assert set(both["head"]) == {"kernel", "scale"}
    for each in (text, both):
        del each["head"]
    jax.tree.map(np.testing.assert_array_equal, text, both)
    convert(tiny_directory, tmp_path / "ours", to="orbax", dtype="bfloat16", quantize=quantize)
    assert open_checkpoint(tmp_path / "ours").quantized == quantize
    stored = mllama_jax.load(tmp_path / "ours", dtype="bfloat16", verify=True).params
    jax.tree.map(np.testing.assert_array_equal, stored, made)
    with pytest.raises(InputError, match=f"holds {quantize} weights, which cannot become int8; load what"):
        mllama_jax.load(tmp_path / "ours", quantize="int8")


@pytest.mark.parametrize(("quantize", "dtype"), [("int8", "bfloat16"), ("int8", "float32"), ("int4", "bfloat16")])
def test_what_is_stored_is_what_loading_makes(quantize: str, dtype: str, tiny_directory: Path, tmp_path: Path) -> None:
    """To the bit, in at most half the bytes, and as Orbax itself restores it."""
    report = convert(tiny_directory, tmp_path / quantize, to="orbax", dtype=dtype, quantize=quantize)
    assert report["bytes"] < 0.8 * convert(tiny_directory, tmp_path / "whole", to="orbax", dtype=dtype)["bytes"]
    found = mllama_jax.load(tmp_path / quantize, dtype=dtype, verify=True).params
    made = mllama_jax.load(tiny_directory, dtype=dtype, quantize=quantize).params
    assert found["text"]["layers_0"]["mlp"]["down"]["kernel"].dtype == STORED[quantize]
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / quantize, jax.tree.map(jnp.zeros_like, made))
    for tree in (found, restored):
        jax.tree.map(np.testing.assert_array_equal, tree, made)


def test_a_flipped_bit_of_a_scale_is_found(tiny_directory: Path, tmp_path: Path) -> None:
    convert(tiny_directory, tmp_path / "int8", to="orbax", quantize="int8")
    chunk = next((tmp_path / "int8" / "text.layers_1.mlp.down.scale" / "c").rglob("0"))
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    assert list(verify(tmp_path / "int8")["damaged"]) == ["text.layers_1.mlp.down.scale"]


def test_what_cannot_be_quantised_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    known = "quantize must be int8, int4, int8-layers, int4-layers"
    with pytest.raises(InputError, match=f"{known} or None, got 'int3'"):
        mllama_jax.load(SHIPPED, quantize="int3")
    with pytest.raises(InputError, match=rf"{known}, and for our layout \(orbax\), got 'int8'"):
        convert(tiny_directory, tmp_path / "hf", to="hf", quantize="int8")
    convert(tiny_directory, tmp_path / "int8", to="orbax", quantize="int8")
    with pytest.raises(InputError, match="holds int8 weights already; convert what it was made from"):
        convert(tmp_path / "int8", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()
    with pytest.raises(InputError, match="holds int8 weights, which cannot become int4; load what it was made from"):
        mllama_jax.load(tmp_path / "int8", quantize="int4")
    with pytest.raises(InputError, match="int4: 63 inputs of a linear map cannot be packed two to a byte; take int8"):
        to_int4(jnp.ones((2, 63)))
