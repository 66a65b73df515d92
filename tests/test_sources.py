"""Checkpoint directories: both layouts opened, and each way in which one can be incomplete or mixed refused."""

import json
import mmap
from pathlib import Path

import numpy as np
import pytest

from mllama_jax.convert.pth import write_pth
from mllama_jax.convert.safetensors import write_safetensors
from mllama_jax.convert.sources import meta_split, open_checkpoint
from tests.archives import fault

WQ, WO, NORM = (f"text_model.layers.0.{name}.weight" for name in ("attention.wq", "attention.wo", "attention_norm"))
INDEX = "model.safetensors.index.json"


def hugging_face(directory: Path, shards: dict[str, dict[str, np.ndarray]], weight_map: object = None) -> Path:
    (directory / "config.json").write_text('{"model_type": "mllama"}')
    for name, tensors in shards.items():
        write_safetensors(directory / name, tensors, {"format": "pt"})
    if list(shards) != ["model.safetensors"]:
        weight_map = weight_map or {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def meta(directory: Path, *shards: dict[str, np.ndarray]) -> Path:
    (directory / "params.json").write_text('{"dim": 4}')
    for rank, tensors in enumerate(shards):
        write_pth(directory / f"consolidated.{rank:02d}.pth", tensors)
    return directory


def split(tensors: dict[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    """As Meta's model-parallel files hold them."""
    pieces = {
        name: [array] * count if (axis := meta_split(name)) is None else np.split(array, count, axis)
        for name, array in tensors.items()
    }
    return [{name: piece[rank] for name, piece in pieces.items()} for rank in range(count)]


def toy() -> dict[str, np.ndarray]:
    return {
        WQ: np.arange(32, dtype=np.float32).reshape(8, 4),
        WO: np.arange(32, dtype=np.float32).reshape(4, 8),
        NORM: np.ones(4, np.float16),
    }


def one(value: float = 0) -> dict[str, np.ndarray]:
    return {"a": np.full(2, value, np.float32)}


def test_opens_one_safetensors_file(tmp_path):
    checkpoint = open_checkpoint(hugging_face(tmp_path, {"model.safetensors": toy()}))
    assert (checkpoint.layout, checkpoint.directory) == ("hf", tmp_path)
    assert checkpoint.config_json == {"model_type": "mllama"}
    assert checkpoint.generation_json == checkpoint.params_json == {}
    assert set(checkpoint.names()) == set(toy())
    for name, array in toy().items():
        (part,) = checkpoint.parts(name)
        np.testing.assert_array_equal(part, array)
        assert isinstance(part.base, mmap.mmap)
        assert (checkpoint.shapes[name], checkpoint.dtypes[name]) == (array.shape, array.dtype)
        assert checkpoint.split_dim(name) is None


def test_opens_an_index_and_its_shards(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.9}')
    names = [f"model-0000{place}-of-00002.safetensors" for place in (1, 2)]
    checkpoint = open_checkpoint(str(hugging_face(tmp_path, {names[0]: one(), names[1]: {"b": np.ones(3)}})))
    assert checkpoint.shapes == {"a": (2,), "b": (3,)}
    assert checkpoint.generation_json == {"top_p": 0.9}
    np.testing.assert_array_equal(checkpoint.parts("b")[0], np.ones(3))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_opens_metas_files(tmp_path, count):
    checkpoint = open_checkpoint(meta(tmp_path, *split(toy(), count)))
    assert (checkpoint.layout, checkpoint.params_json, checkpoint.config_json) == ("meta", {"dim": 4}, {})
    for name, array in toy().items():
        parts, axis = checkpoint.parts(name), checkpoint.split_dim(name)
        assert len(parts) == count
        assert (checkpoint.shapes[name], checkpoint.dtypes[name]) == (array.shape, array.dtype)
        np.testing.assert_array_equal(parts[-1] if axis is None else np.concatenate(parts, axis), array)


def test_opens_metas_single_file_and_other_splits(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    write_pth(tmp_path / "consolidated.pth", toy())
    assert open_checkpoint(tmp_path).shapes == {name: array.shape for name, array in toy().items()}
    (tmp_path / "consolidated.pth").unlink()
    checkpoint = open_checkpoint(meta(tmp_path, one(1), one(2)), split_dim=lambda name: 0)
    assert checkpoint.shapes == {"a": (4,)}
    assert [part[0] for part in checkpoint.parts("a")] == [1, 2]


@pytest.mark.parametrize(
    ("dim", "names"),
    [
        (0, "layers.3.attention.wq.weight layers.3.attention.wk.weight layers.3.attention.wv.weight"),
        (0, "layers.3.feed_forward.w1.weight layers.3.feed_forward.w3.weight tok_embeddings.weight output.weight"),
        (0, "learnable_embedding.weight vision_encoder.conv1._linear.weight resblocks.1.attn.wq.weight"),
        (0, "resblocks.1.mlp.c_fc.weight resblocks.1.mlp.c_fc.bias vision_projection.weight vision_projection.bias"),
        (1, "layers.3.attention.wo.weight layers.3.feed_forward.w2.weight resblocks.1.mlp.c_proj.weight"),
        (None, "resblocks.1.mlp.c_proj.bias resblocks.1.ln_1.weight norm.weight layers.3.attention_norm.weight"),
        (None, "cross_attention_layers.0.attention.q_norm.weight cross_attention_layers.0.gate_attn class_embedding"),
        (None, "pre_tile_pos_embed.embedding positional_embedding rope.freqs"),
    ],
)
def test_metas_split_dimensions(dim, names):
    for name in names.split():
        assert meta_split(f"model.{name}") == dim, name


@pytest.mark.parametrize(
    ("present", "says"),
    [
        (
            [],
            "no checkpoint: expected model.safetensors, model.safetensors.index.json, consolidated.pth, ",
        ),
        (["original"], "its folder 'original' may be one"),
        (["model-00001-of-00002.safetensors", "config.json"], "no checkpoint"),
        (["model.safetensors.partial", "consolidated.0.pth", "pytorch_model.bin"], "no checkpoint"),
        (["model.safetensors", INDEX], f"ambiguous: holds model.safetensors and {INDEX}"),
        (["model.safetensors", "consolidated.00.pth"], "ambiguous: holds model.safetensors and consolidated.00.pth"),
        (["consolidated.pth", "consolidated.00.pth"], "ambiguous: holds consolidated.00.pth and consolidated.pth"),
        (["model.safetensors"], "config.json: cannot be read: No such file or directory"),
        (["consolidated.pth"], "params.json: cannot be read: No such file or directory"),
    ],
)
def test_directories_without_a_checkpoint_are_refused(tmp_path, present, says):
    for name in present:
        (tmp_path / name).touch()
    message = fault(open_checkpoint, tmp_path)
    assert message.startswith(str(tmp_path))
    assert says in message


def test_paths_that_are_no_directory_are_refused(tmp_path):
    assert "absent: does not exist; expected a checkpoint directory" in fault(open_checkpoint, tmp_path / "absent")
    assert fault(open_checkpoint, "no/model").endswith("`mllama convert no/model DIR` fetches it")
    assert fault(open_checkpoint, "../no-model").endswith("does not exist; expected a checkpoint directory")
    (tmp_path / "file").touch()
    assert "file: is a file; expected a checkpoint directory" in fault(open_checkpoint, tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{broken", "config.json: invalid JSON (Expecting property name"),
        ("[]", "config.json: expected a JSON object, got a list"),
        ('{"a": 1, "a": 2}', "config.json: key 'a' appears twice"),
        ('{"a": Infinity}', "config.json: holds Infinity, which is not JSON"),
        ("", "config.json: invalid JSON (Expecting value"),
    ],
)
def test_broken_json_is_refused(tmp_path, content, says):
    hugging_face(tmp_path, {"model.safetensors": toy()})
    (tmp_path / "config.json").write_text(content)
    assert says in fault(open_checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "x.safetensors", "b": "z.safetensors"}, f"{INDEX}: names 1 absent files: z.safetensors; download them"),
        ({"a": "../x.safetensors"}, "expected names of .safetensors files beside it, got '../x.safetensors'"),
        ({"a": "/etc/x.safetensors"}, "expected names of .safetensors files beside it, got '/etc/x.safetensors'"),
        ({"a": "x.bin"}, "expected names of .safetensors files beside it, got 'x.bin'"),
        ({"a": "x.safetensors\n"}, "expected names of .safetensors files beside it, got 'x.safetensors\\n'"),
        ({"a": 1}, "expected an object 'weight_map' of tensor name to file name"),
        (["a"], "expected an object 'weight_map' of tensor name to file name"),
        ({"a": "y.safetensors", "b": "y.safetensors"}, "y.safetensors: tensor 'a' is missing, though"),
        ({"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"}, "tensor 'c' is missing, though"),
    ],
)
def test_faulty_indices_are_refused(tmp_path, weight_map, says):
    shards = {"x.safetensors": one(), "y.safetensors": {"b": np.ones(2)}}
    assert says in fault(open_checkpoint, hugging_face(tmp_path, shards, weight_map))


def test_files_that_the_index_does_not_name_are_ignored(tmp_path):
    shards = {"x.safetensors": one(), "y.safetensors": {"b": np.ones(2)}}
    assert list(open_checkpoint(hugging_face(tmp_path, shards, {"a": "x.safetensors"})).names()) == ["a"]


def test_tensors_beside_the_index_are_refused(tmp_path):
    shards = {"x.safetensors": one(), "y.safetensors": {"b": np.ones(2)} | one(1)}
    hugging_face(tmp_path, shards, {"a": "x.safetensors", "b": "y.safetensors"})
    assert "y.safetensors: tensor 'a' is also in x.safetensors" in fault(open_checkpoint, tmp_path)
    write_safetensors(tmp_path / "y.safetensors", {"b": np.ones(2), "c": np.ones(2)}, {})
    assert f"y.safetensors: tensor 'c' is not in {INDEX}" in fault(open_checkpoint, tmp_path)


def test_truncated_shard_is_refused_by_name(tmp_path):
    hugging_face(tmp_path, {"x.safetensors": one(), "y.safetensors": {"b": np.ones(2)}})
    shard = tmp_path / "y.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "y.safetensors: truncated" in fault(open_checkpoint, tmp_path)


def test_missing_meta_shards_are_refused(tmp_path):
    meta(tmp_path, *split(toy(), 4))
    (tmp_path / "consolidated.01.pth").unlink()
    message = fault(open_checkpoint, tmp_path)
    assert "missing consolidated.01.pth, though consolidated.03.pth is there" in message
    (tmp_path / "consolidated.03.pth").rename(tmp_path / "consolidated.01.pth")
    message = fault(open_checkpoint, tmp_path)
    assert "holds 3 consolidated files; expected 1, 2, 4 or 8; one may be missing" in message


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"b": np.ones(2)}, "only one of them holds 'a' (2 such tensors)"),
        (one() | {"b": np.ones(2)}, "a shard of another model than consolidated.00.pth: only one of them holds 'b'"),
        ({"a": np.ones(3, np.float32)}, "tensor 'a': expected float32 [2] as in consolidated.00.pth, got float32 [3]"),
        ({"a": np.ones(2, np.float16)}, "tensor 'a': expected float32 [2] as in consolidated.00.pth, got float16 [2]"),
    ],
)
def test_shards_of_two_models_are_refused(tmp_path, second, says):
    message = fault(open_checkpoint, meta(tmp_path, one(), second))
    assert "consolidated.01.pth: " in message
    assert says in message


def test_tensor_too_flat_to_be_split_is_refused(tmp_path):
    assert f"tensor {WO!r}: expected more than 1 dimensions, got (4,)" in fault(
        open_checkpoint, meta(tmp_path, {WO: np.ones(4)}, {WO: np.ones(4)})
    )
