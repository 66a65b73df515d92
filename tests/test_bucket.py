"""Our layout in a bucket: written and read by parts, never staged on a disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import jax
import numpy as np
import pytest

import mllama_jax
from mllama_jax import Mllama
from mllama_jax.cli import main
from mllama_jax.convert import orbax
from mllama_jax.convert.apply import parameters, read_config
from mllama_jax.convert.run import convert
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.convert.verify import verify
from mllama_jax.planner import config_of
from tests.archives import fault
from tests.bucket import Bucket
from tests.test_convert import assert_same, assert_same_tensors

PLACE = "gs://bucket/models/small"


@pytest.fixture(scope="module")
def bucket(small_directory: Path) -> Iterator[Bucket]:
    """A bucket that holds the small model."""
    server = Bucket()
    Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "a word")
        patch.setattr(orbax, "_SMALLEST", 4096)
        convert(small_directory, PLACE, to="orbax")
        yield server
    server.shutdown()
    server.server_close()


def test_a_bucket_serves_like_a_directory(bucket: Bucket, small: Mllama, small_directory: Path, tmp_path: Path) -> None:
    assert not any("unfinished" in name for name in bucket.objects)
    model = mllama_jax.load(PLACE, dtype="float32", verify=True)
    assert_same(model.params, jax.tree.map(np.asarray, small.params))
    settings = {"max_new_tokens": 4, "stop_ids": ()}
    conversations = [[{"role": "user", "content": "hello"}]]
    assert model.generate(conversations, **settings) == small.generate(conversations, **settings)
    convert(PLACE, tmp_path / "hf", to="hf")
    assert_same_tensors(small_directory, tmp_path / "hf")


def test_commands_find_a_checkpoint_in_a_bucket(
    bucket: Bucket, small_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [main(["inspect", str(place), "--json"]) for place in (PLACE, small_directory)] == [0, 0]
    there, here = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (there["directory"], there["layout"]) == (PLACE, "Orbax")
    for name in ("config", "parameters", "parts"):
        assert there[name] == here[name]
    assert config_of(PLACE) == config_of(str(small_directory))


def test_hugging_faces_files_are_read_from_a_bucket(bucket: Bucket, small_directory: Path, tmp_path: Path) -> None:
    """Streamed: each tensor's bytes once, beside headers; and a conversion there makes what one from the disk makes."""
    split = tmp_path / "split"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mllama_jax.convert.run._HF_FILE", 2**17)
        convert(small_directory, split, to="hf")
    for path in split.iterdir():
        bucket.objects[f"theirs/{path.name}"] = (path.read_bytes(), 1000)
    bucket.objects["theirs/NOTICE"] = (b"", 999)
    bucket.got.clear()
    convert("gs://bucket/theirs", "gs://bucket/converted", to="orbax")
    weights = {name: size for name, size in bucket.got.items() if name.endswith(".safetensors")}
    assert len(weights) > 2
    for name, size in weights.items():
        assert size <= len(bucket.objects[name][0]) + 100
    assert mllama_jax.load("gs://bucket/converted", dtype="float32", verify=True).tokenizer is not None
    convert("gs://bucket/converted", tmp_path / "hf", to="hf")
    assert_same_tensors(small_directory, tmp_path / "hf")
    name = max(weights)
    content, _ = bucket.objects[name]
    for damaged, message in (
        (content[:-1], f"truncated: expected {len(content)} bytes, got {len(content) - 1}"),
        (content + b"x", f"bytes after the last tensor: expected {len(content)} bytes, got {len(content) + 1}"),
        (content[:7], "not a safetensors file"),
    ):
        bucket.objects[name] = (damaged, 1001)
        assert message in fault(mllama_jax.load, "gs://bucket/theirs")
    bucket.objects["theirs/consolidated.00.pth"] = (b"", 1)
    assert "ambiguous: holds model.safetensors.index.json and consolidated.00.pth" in fault(
        mllama_jax.load, "gs://bucket/theirs"
    )
    bucket.objects["meta/consolidated.00.pth"] = (b"", 1)
    assert "Meta's files are read from disks only" in fault(mllama_jax.load, "gs://bucket/meta")


def test_a_slice_reads_only_the_chunks_it_needs(bucket: Bucket) -> None:
    checkpoint = open_checkpoint(PLACE)
    parameter = parameters(checkpoint, read_config(checkpoint))[("text", "layers_0", "mlp", "down", "kernel")]
    bucket.got.clear()
    width, hidden = parameter.shape
    parameter.read((slice(0, width), slice(hidden // 2, hidden)))
    read = sum(size for name, size in bucket.got.items() if "/c/" in name)
    assert read == width * hidden * parameter.dtype.itemsize // 2


def test_a_conversion_goes_on_in_the_bucket(bucket: Bucket, small_directory: Path) -> None:
    place = "gs://bucket/again"
    convert(small_directory, place, to="orbax")
    whole = {name: content for name, (content, _) in bucket.objects.items() if name.startswith("again/")}
    for name in whole:
        del bucket.objects[name]
    with pytest.MonkeyPatch.context() as patch:
        # all arrays are there, and nothing that names them
        patch.setattr("mllama_jax.convert.run.write_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(small_directory, place, to="orbax")
    assert "its conversion has not ended" in fault(mllama_jax.load, place)
    assert "holds part of another conversion" in fault(
        lambda: convert(small_directory, place, to="orbax", dtype="bfloat16")
    )
    report = convert(small_directory, place, to="orbax")
    assert report["resumed"] == report["tensors"]
    assert whole == {name: content for name, (content, _) in bucket.objects.items() if name.startswith("again/")}


def test_faults_are_one_line(bucket: Bucket, small_directory: Path) -> None:
    assert f"{PLACE}: already holds" in fault(lambda: convert(small_directory, PLACE, to="orbax"))
    assert "gs://bucket/new: Hugging Face's and Meta's files are written to disks only; choose orbax" in fault(
        lambda: convert(small_directory, "gs://bucket/new", to="hf")
    )
    assert not any(name.startswith("new/") for name in bucket.objects)
    assert "gs://bucket/none: no checkpoint: expected model.safetensors" in fault(mllama_jax.load, "gs://bucket/none")
    assert "Invalid GCS bucket name" in fault(mllama_jax.load, "gs://B/none")
    name = "models/small/text.final_norm.scale/c/0"
    content, generation = bucket.objects[name]
    bucket.objects[name] = (content[:-1] + bytes([content[-1] ^ 1]), generation + 1000)
    assert list(verify(PLACE)["damaged"]) == ["text.final_norm.scale"]
    bucket.objects[name] = (content, generation + 2000)
