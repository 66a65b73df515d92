"""Checkpoints in and out: every layout gives the same parameters, and goes back tensor by tensor unchanged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mllama_jax
from mllama_jax import MllamaConfig
from mllama_jax.config import RopeScaling
from mllama_jax.convert.apply import insert, load_parameters, parameters, paths, read_config
from mllama_jax.convert.axes import everything
from mllama_jax.convert.export import meta_params, write_hf, write_meta
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import Params, abstract_parameters
from tests.conftest import SMALL

DTYPES = (np.dtype("float32"), np.dtype(ml_dtypes.bfloat16))


def read(directory: Path) -> tuple[MllamaConfig, Params]:
    checkpoint = open_checkpoint(directory)
    config = read_config(checkpoint)
    found = parameters(checkpoint, config)
    return config, load_parameters(found, lambda path, shape, read: np.array(read(everything(shape))))


def random_params(config: MllamaConfig, seed: int = 0) -> Params:
    """Random float32 weights, zero in the tile tables, whose rows must agree where Meta's layout shall hold them."""
    rng, params = np.random.default_rng(seed), {}
    for path, leaf in paths(nn.unbox(abstract_parameters(config))).items():
        shape = leaf.shape
        value = np.zeros(shape) if path[-1] in ("table", "tiles") else rng.standard_normal(shape) / shape[-1] ** 0.5
        insert(params, path, value.astype(np.float32))
    return params


def tensors(directory: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(directory)
    return {f"{name}/{i}": part for name in checkpoint.names() for i, part in enumerate(checkpoint.parts(name))}


def assert_same(ours: Params, theirs: Params) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (other.dtype, other.shape, other.tobytes()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hugging_face_and_back(small_params: Params, tmp_path: Path, dtype: np.dtype) -> None:
    write_hf(tmp_path / "a", small_params, SMALL, dtype)
    config, params = read(tmp_path / "a")
    assert config == SMALL
    assert_same(params, jax.tree.map(lambda x: np.asarray(x).astype(dtype), small_params))
    write_hf(tmp_path / "b", params, config, dtype)
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_and_back(small_params: Params, tmp_path: Path, dtype: np.dtype, shards: int) -> None:
    write_meta(tmp_path / "a", small_params, SMALL, dtype, shards)
    config, params = read(tmp_path / "a")
    assert (config.text.cross_layers, config.vision) == (SMALL.text.cross_layers, SMALL.vision)
    write_meta(tmp_path / "b", params, config, dtype, shards)
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_both_layouts_give_the_same_parameters(small_params: Params, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", small_params, SMALL, DTYPES[0])
    write_meta(tmp_path / "meta", small_params, SMALL, DTYPES[0])
    hf, meta = read(tmp_path / "hf")[1], read(tmp_path / "meta")[1]
    for tree in (hf, meta):  # what no picture reaches is whatever it was in one, and zero in the other
        for part in ("pre_tile_embedding", "post_tile_embedding"):
            tree["vision"][part]["table"] = tree["vision"][part]["table"][1:, :1]
        tree["vision"]["position_embedding"]["tiles"] = tree["vision"]["position_embedding"]["tiles"][1:, :1]
    assert_same(hf, meta)


def renamed(name: str) -> str:
    """A tensor's name since transformers 4.52."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


def test_key_names_of_both_generations_and_shards(small_directory: Path, tmp_path: Path) -> None:
    shutil.copy(small_directory / "config.json", tmp_path)
    weights = {renamed(name): tensor for name, tensor in load_file(small_directory / "model.safetensors").items()}
    names = sorted(weights)
    half = len(names) // 2
    files = {"model-1.safetensors": names[:half], "model-2.safetensors": names[half:]}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(read(tmp_path)[1], read(small_directory)[1])


def test_half_precision_rounds_to_nearest_even(small_directory: Path) -> None:
    ours = mllama_jax.load(small_directory, dtype="bfloat16").params["text"]["layers_0"]["mlp"]["down"]["kernel"]
    theirs = load_file(small_directory / "model.safetensors")["language_model.model.layers.0.mlp.down_proj.weight"]
    bits = theirs.view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(np.asarray(ours).view(np.uint16), expected)


def test_one_report_of_all_that_does_not_fit(small_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(small_directory, tmp_path, dirs_exist_ok=True)
    weights = load_file(small_directory / "model.safetensors")
    del weights["vision_model.class_embedding"]
    weights["vision_model.extra"] = np.zeros(3, np.float32)
    weights["language_model.model.norm.weight"] = np.zeros(63, np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        mllama_jax.load(tmp_path)
    for part in (
        "1 missing: vision_model.class_embedding",
        "1 unexpected: vision_model.extra",
        "1 misshapen: language_model.model.norm.weight [63] instead of [64]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_weights_under_the_config_of_a_larger_model(small_params: Params, tmp_path: Path, layout: str) -> None:
    """As the 11B's weights under the 90B's config: one line, with counts and the first that do not fit."""
    write = write_hf if layout == "hf" else write_meta
    write(tmp_path, small_params, SMALL, DTYPES[0])
    path = tmp_path / ("config.json" if layout == "hf" else "params.json")
    config = json.loads(path.read_text())
    if layout == "hf":
        config["text_config"] |= {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 192}
    else:
        config |= {"dim": 128, "n_heads": 8}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"the tensors do not fit its config: \d+ misshapen: .* instead of ") as error:
        mllama_jax.load(tmp_path)
    assert "\n" not in str(error.value)


def test_rows_that_disagree_cannot_become_meta(small_params: Params, tmp_path: Path) -> None:
    params = jax.tree.map(np.array, small_params)
    params["vision"]["pre_tile_embedding"]["table"][2, 0] += 1
    with pytest.raises(InputError, match="aspect ratio rows disagree about a tile"):
        write_meta(tmp_path, params, SMALL, DTYPES[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"rope_scaling": RopeScaling(factor=32.0)}, "Meta's layout cannot hold rope_scaling"),
        ({"hidden": 95}, "Meta's layout cannot hold hidden 95; it would be read as 96"),
        ({"tied": True}, "Meta's layout cannot hold tied True"),
        ({"cross_layers": (0, 1)}, "Meta's layout spreads cross-attention layers evenly"),
    ],
)
def test_what_metas_layout_cannot_say_is_refused(text: dict, message: str) -> None:
    config = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, **text))
    with pytest.raises(InputError, match=message):
        meta_params(config)


@pytest.mark.parametrize(
    ("argument", "message"),
    [({"dtype": "int4"}, "dtype must be one of bfloat16, float32, float16, got 'int4'")],
)
def test_bad_arguments(small_directory: Path, argument: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mllama_jax.load(small_directory, **argument)
