"""`convert` between all layouts: what comes back is what was there, and our own layout is Orbax's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.experimental import v1
from safetensors.numpy import load_file, save_file

import mllama_jax
from mllama_jax import Mllama
from mllama_jax.config import QUANTIZATIONS
from mllama_jax.convert import orbax
from mllama_jax.convert.apply import parameters, read_config, renamed
from mllama_jax.convert.export import write_hf, write_meta
from mllama_jax.convert.pth import write_pth
from mllama_jax.convert.run import convert
from mllama_jax.convert.sources import meta_split, open_checkpoint
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import Params
from tests.conftest import SMALL
from tests.test_convert import DTYPES, assert_same, assert_same_tensors, read, tensors

UNREACHABLE = [(y, x) for y in range(4) for x in range(4) if (y + 1) * (x + 1) > 4]
TABLES = ("gated_positional_embedding", "pre_tile_pos_embed.embedding", "post_tile_pos_embed.embedding")


@pytest.fixture(scope="module")
def template(small_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release directory of Meta's in one file."""
    directory = tmp_path_factory.mktemp("meta")
    write_meta(directory, small_params, SMALL, np.dtype("float32"))
    return directory


def release(template: Path, directory: Path, dtype: np.dtype, shards: int) -> Path:
    """A release of random tensors, among them cells that no picture reaches and rotary frequencies."""
    checkpoint, rng = open_checkpoint(template), np.random.default_rng(0)
    directory.mkdir()
    (directory / "params.json").write_bytes((template / "params.json").read_bytes())
    shapes = {**checkpoint.shapes, "text_model.rope.freqs": (8,)}
    whole = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    for rank in range(shards):
        part = {
            name: tensor if (axis := meta_split(name)) is None else np.split(tensor, shards, axis)[rank]
            for name, tensor in whole.items()
        }
        write_pth(directory / f"consolidated.{rank:02d}.pth", part)
    return directory


@pytest.mark.parametrize("generation", ["before 4.52", "since 4.52"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hugging_face_through_ours(small_params: Params, tmp_path: Path, dtype: np.dtype, generation: str) -> None:
    a, ours, b = tmp_path / "a", tmp_path / "ours", tmp_path / "b"
    write_hf(a, small_params, SMALL, dtype)
    if generation == "since 4.52":
        weights = load_file(a / "model.safetensors")
        save_file({renamed(name): tensor for name, tensor in weights.items()}, a / "model.safetensors")
    convert(a, ours, to="orbax")
    convert(ours, b, to="hf")
    assert_same_tensors(a, b)
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        assert json.loads((a / name).read_text()) == json.loads((b / name).read_text())


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_through_ours(template: Path, tmp_path: Path, dtype: np.dtype, shards: int) -> None:
    a, ours, b = release(template, tmp_path / "a", dtype, shards), tmp_path / "ours", tmp_path / "b"
    convert(a, ours, to="orbax")
    convert(ours, b, to="meta", shards=shards)
    assert_same_tensors(a, b)
    assert json.loads((a / "params.json").read_text()) == json.loads((b / "params.json").read_text())


def test_meta_through_hugging_face(template: Path, tmp_path: Path) -> None:
    """All comes back but the cells that no picture reaches, and the frequencies that follow from the configuration."""
    a, hf, b = release(template, tmp_path / "a", DTYPES[1], 2), tmp_path / "hf", tmp_path / "b"
    convert(a, hf, to="hf")
    convert(hf, b, to="meta", shards=2)
    before, after = tensors(a), tensors(b)
    assert before.keys() - after.keys() == {"text_model.rope.freqs/0", "text_model.rope.freqs/1"}
    cleared = 0
    for name, tensor in after.items():
        expected = np.array(before[name])
        if name.rpartition("/")[0].endswith(TABLES):
            assert all(expected[cell].any() for cell in UNREACHABLE)
            expected[tuple(np.transpose(UNREACHABLE))] = 0
            cleared += 1
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    assert cleared == len(TABLES) * 2


def test_the_way_does_not_matter(template: Path, tmp_path: Path) -> None:
    a = release(template, tmp_path / "a", DTYPES[0], 2)
    convert(a, tmp_path / "ours", to="orbax")
    convert(tmp_path / "ours", tmp_path / "hf", to="hf", dtype="bfloat16")
    convert(a, tmp_path / "direct", to="hf", dtype="bfloat16")
    assert_same_tensors(tmp_path / "hf", tmp_path / "direct")
    convert(a, tmp_path / "meta", to="meta", shards=4)
    convert(tmp_path / "meta", tmp_path / "again", to="orbax")
    assert_same(read(tmp_path / "again")[1], read(tmp_path / "ours")[1])


@pytest.mark.parametrize("start", [np.float16, np.float32])
def test_conversion_rounds_to_nearest_even(small_params: Params, tmp_path: Path, start: type) -> None:
    write_hf(tmp_path / "a", small_params, SMALL, np.dtype(start))
    convert(tmp_path / "a", tmp_path / "b", to="hf", dtype="bfloat16")
    wide, narrow = load_file(tmp_path / "a/model.safetensors"), tensors(tmp_path / "b")
    for name, tensor in wide.items():
        bits = tensor.astype(np.float32).view(np.uint32).astype(np.uint64)
        expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        assert np.array_equal(narrow[f"{name}/0"].view(np.uint16), expected), name


def test_large_checkpoints_are_split(small_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllama_jax.convert.run._HF_FILE", 200_000)
    convert(small_directory, tmp_path / "b", to="hf")
    files = sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_tensors(small_directory, tmp_path / "b")


# ---- Our layout ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(small_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ours") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax, "_SMALLEST", 1)  # as if the arrays were large: all chunks that there can be
        convert(small_directory, directory, to="orbax")
    return directory


def test_the_files_beside_the_weights_come_along(small_directory: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(small_directory, source)
    (source / "LICENSE.txt").write_text("terms")
    convert(source, tmp_path / "meta", to="meta")
    convert(tmp_path / "meta", tmp_path / "ours", to="orbax")
    convert(tmp_path / "ours", tmp_path / "hf", to="hf")
    beside = {path.name for path in source.iterdir()} - {"model.safetensors", "config.json"}
    assert {"tokenizer.json", "LICENSE.txt"} <= beside
    for name in beside:
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    assert mllama_jax.load(tmp_path / "meta").tokenizer is not None


def test_the_directory_alone_serves(ours: Path, small: Mllama) -> None:
    model = mllama_jax.load(ours, dtype="float32", verify=True)
    assert_same(model.params, jax.tree.map(np.asarray, small.params))
    conversation = [{"role": "user", "content": "hello"}]
    settings = {"max_new_tokens": 4, "stop_ids": ()}
    assert model.generate([conversation], **settings) == small.generate([conversation], **settings)
    assert model.config == small.config


@pytest.mark.parametrize("quantize", [None, *QUANTIZATIONS])
def test_a_loaded_model_is_saved_as_convert_writes_it(template: Path, tmp_path: Path, quantize: str | None) -> None:
    """All files to the byte, with what no parameter of ours holds."""
    a = release(template, tmp_path / "a", DTYPES[1], 1)
    convert(a, tmp_path / "converted", to="orbax", dtype="float32", quantize=quantize)
    model = mllama_jax.load(a, dtype="float32", quantize=quantize)
    mllama_jax.save(model, tmp_path / "saved")
    converted, saved = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "converted", tmp_path / "saved")
    )
    assert saved == converted
    with pytest.raises(InputError, match=r"saved: already holds .* choose another target"):
        mllama_jax.save(model, tmp_path / "saved")


def test_plain_orbax_restores_it(ours: Path) -> None:
    expected = read(ours)[1]
    assert_same(ocp.StandardCheckpointer().restore(ours), expected)
    assert_same(ocp.PyTreeCheckpointer().restore(ours), expected)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), expected)
    assert_same(jax.tree.map(np.asarray, v1.load(str(ours), abstract)), expected)


def test_a_slice_reads_only_the_chunks_it_needs(ours: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ours)
    parameter = parameters(checkpoint, read_config(checkpoint))[("text", "layers_0", "mlp", "gate_up", "kernel")]
    two, hidden, width = parameter.shape
    chunks = ours / "text.layers_0.mlp.gate_up.kernel/c"
    held = {path: path.read_bytes() for path in chunks.rglob("*") if path.is_file()}
    assert len(held) == two * 16
    whole = parameter.whole()
    try:
        for path in held:
            if path.parent.name in {"8", "9", "10", "11", "12", "13", "14", "15"}:
                path.unlink()
        half = parameter.read((slice(0, two), slice(0, hidden // 2), slice(0, width)))
        assert np.array_equal(half, whole[:, : hidden // 2])
        with pytest.raises(InputError, match=r"text.layers_0.mlp.gate_up.kernel: NOT_FOUND: chunk"):
            parameter.whole()
    finally:
        for path, content in held.items():
            path.write_bytes(content)


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_any_slice_is_that_slice_of_the_whole(template: Path, tmp_path: Path, shards: int) -> None:
    rng = np.random.default_rng(0)
    checkpoint = open_checkpoint(release(template, tmp_path / "a", DTYPES[0], shards))
    for path, parameter in parameters(checkpoint, read_config(checkpoint)).items():
        starts = [int(rng.integers(n)) for n in parameter.shape]
        index = tuple(slice(a, int(rng.integers(a, n)) + 1) for a, n in zip(starts, parameter.shape, strict=True))
        assert np.array_equal(parameter.read(index), parameter.whole()[index]), path


def test_slices_are_views_of_the_files(small_directory: Path) -> None:
    checkpoint = open_checkpoint(small_directory)
    parameter = parameters(checkpoint, read_config(checkpoint))[("text", "layers_0", "attention", "kv", "kernel")]
    one = parameter.read((slice(1, 2), slice(0, 1), *(slice(0, n) for n in parameter.shape[2:])))
    (file,) = checkpoint.parts("language_model.model.layers.0.self_attn.v_proj.weight")
    assert np.shares_memory(one, file)
