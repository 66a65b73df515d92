"""A run whose directory lies in a bucket, which several processes share."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

import mllama_jax
from mllama_jax.cli import main
from mllama_jax.train.command import PREEMPTED
from tests.bucket import Bucket
from tests.long.test_train_processes import Pair, history
from tests.training import line, write

OUT = "gs://bucket/run"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = Bucket()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "a word")
    yield server
    server.shutdown()
    server.server_close()


def test_two_processes_share_a_bucket(bucket: Bucket, tiny_directory: Path, tmp_path: Path) -> None:
    """Told to end, they go on from there as a run on a disk that was not."""
    chats = [line(i) for i in range(18) if i % 3 < 2]
    settings: dict[str, Any] = {"preset": "fsdp", "held_out": "chats.jsonl", "samples": 4, "steps": 30}
    recipe = write(tmp_path / "data", chats, tiny_directory, save_every=10, **settings)
    with Pair(recipe, out=tmp_path / "disk") as disk:
        assert [each[0] for each in disk.ended()] == [0]
    with Pair(recipe, recipe, out=OUT) as told:
        while "run/checkpoints/10/commit_success.txt" not in bucket.objects:
            assert all(process.poll() is None for process in told.processes), told.ended()
            time.sleep(0.01)
        told.processes[1].terminate()
        assert [each[0] for each in told.ended()] == [PREEMPTED] * 2
    assert len(events(bucket)) == 1
    with Pair(recipe, recipe, out=OUT) as last:
        ended = last.ended()
    assert [each[0] for each in ended] == [0, 0], ended
    assert ended[0][1].startswith(f"{OUT}/adapter: 30 steps, loss ")
    found = [json.loads(each) for each in bucket.objects["run/history.jsonl"][0].splitlines()]
    assert [each["step"] for each in found] == list(range(1, 31))
    for name in ("loss", "gradient_norm"):
        wanted = [each[name] for each in history(tmp_path / "disk")]
        np.testing.assert_allclose([each[name] for each in found], wanted, rtol=1e-5)
    assert len(events(bucket)) == 2
    assert bucket.objects["run/history.png"][0].startswith(b"\x89PNG")
    tuned = load(bucket.objects["run/adapter/adapter_model.safetensors"][0])
    expected = load((tmp_path / "disk/adapter/adapter_model.safetensors").read_bytes())
    assert tuned.keys() == expected.keys()
    for name, array in tuned.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-4)
    merged = ["convert", str(tiny_directory), str(tmp_path / "merged"), "--to", "hf", "--lora", f"{OUT}/adapter"]
    assert main(merged) == 0


def events(bucket: Bucket) -> list[str]:
    return [name for name in bucket.objects if name.startswith("run/events/")]


def test_a_tuned_model_is_written_to_a_bucket(bucket: Bucket, tiny_directory: Path, tmp_path: Path) -> None:
    """In our layout, and again by a run that finds nothing left to do."""
    recipe = write(tmp_path / "data", [line(0)], tiny_directory, part="adapter", steps=2, samples=1)
    for _ in range(2):
        with Pair(recipe, out=OUT) as run:
            ((code, told, _),) = run.ended()
        assert (code, told.startswith(f"{OUT}/model: 2 steps")) == (0, True)
    tuned = mllama_jax.load(f"{OUT}/model", dtype="float32", verify=True)
    assert tuned.tokenizer is not None
