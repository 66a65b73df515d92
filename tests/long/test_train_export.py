"""What training leaves: checkpoints in both layouts that hold the tuned model, and an adapter learned over int8."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import mllama_jax
from mllama_jax import Mllama
from mllama_jax.cli import main
from mllama_jax.convert.export import write_hf
from mllama_jax.model.mllama import Params
from mllama_jax.train.checkpoints import Checkpoints
from mllama_jax.train.parts import Lora, Part, merge
from mllama_jax.train.pictures import tokenizer
from mllama_jax.train.recipe import read_recipe
from mllama_jax.train.trainer import Trainer
from tests.conftest import TINY
from tests.exported import export
from tests.test_processes import free_port
from tests.training import line, write

ROOT = Path(__file__).parents[2]
ADAPTER = re.compile(r"^(vision_model|multi_modal_projector|language_model\.model\.layers\.1)\.")
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def source(tiny_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, as those of Meta are."""
    directory = tmp_path_factory.mktemp("source")
    write_hf(directory, tiny_params, TINY, BF16)
    tokenizer.write(directory)
    return directory


def logits(model: Mllama) -> np.ndarray:
    tokens = np.array([[TINY.bos, TINY.image_token, 3, 4, 5, 6, 7, 8]])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 60, 3), np.uint8))
    return model.logits(tokens, [[picture]])


@pytest.mark.parametrize(("part", "dtype"), [("adapter", "float32"), ("full", "bfloat16")])
def test_the_tuned_model_is_written_in_both_layouts(source: Path, tmp_path: Path, part: Part, dtype: str) -> None:
    chats = [line(i) for i in range(12) if i % 3 < 2]  # of one shape: each compiles
    recipe = write(tmp_path / "data", chats, source, part=part, dtype=dtype, samples=4, steps=4)
    out = tmp_path / "out"
    assert main(["train", str(recipe), str(out)]) == 0
    assert main(["convert", str(out / "model"), str(tmp_path / "meta"), "--to", "meta"]) == 0

    trainer = Trainer.of(read_recipe(recipe))
    found = Checkpoints(str(out), read_recipe(recipe)).latest(trainer.state)
    assert found is not None
    state, frozen = found[0], trainer.frozen.params
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(frozen))
    tuned = jax.tree.map(lambda leaf: leaf.astype(BF16).astype(jnp.float32), merge(state.params, frozen, Lora()))
    base, *models = (mllama_jax.load(each, dtype="float32") for each in (source, out / "model", tmp_path / "meta"))
    expected = logits(dataclasses.replace(base, params=tuned))
    assert np.abs(expected - logits(base)).max() > 0.1
    for model in models:
        np.testing.assert_array_equal(logits(model), expected)

    before, after = (load_file(each / "model.safetensors") for each in (source, out / "model"))
    assert before.keys() == after.keys()
    assert {array.dtype for array in after.values()} == {BF16}
    same = {name for name, array in before.items() if array.tobytes() == after[name].tobytes()}
    kept = {name for name in before if part == "adapter" and not ADAPTER.search(name)}
    assert len(kept) == (2 * 9 + 3 if part == "adapter" else 0)  # of two layers, the embedding, the norm, the head
    assert kept <= same
    assert not {name for name in same - kept if before[name].ndim > 1}


def test_lora_is_learned_over_int8(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a recipe, of which a chat is too long; the adapter goes into the checkpoint that is not in int8."""
    chats: list[Any] = [*(line(i) for i in range(12) if i % 3 < 2), line(3, words=90)]
    recipe = write(tmp_path / "data", chats, source, quantize="int8", samples=4, steps=20, learning_rate=1e-2)
    out = tmp_path / "out"
    assert main(["train", str(recipe), str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["dropped"], report["cut"]) == (20, 1, 0)
    losses = [json.loads(each)["loss"] for each in (out / "history.jsonl").read_text().splitlines()]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5
    command = ["convert", str(source), str(tmp_path / "merged"), "--to", "orbax", "--lora", str(out / "adapter")]
    assert main(command) == 0
    base, merged = (mllama_jax.load(each, dtype="float32") for each in (source, tmp_path / "merged"))
    assert np.abs(logits(merged) - logits(base)).max() > 0.1


@pytest.mark.parametrize("part", ["lora", "adapter", "full"])
def test_processes_export_as_one_does(source: Path, tmp_path: Path, part: Part) -> None:
    """To the byte; where whole tensors are written, the first holds three at once (one is made, one waits, one goes to
    the disk), the other one."""
    recipe = write(tmp_path / "data", [line(0)], source, part=part, preset="fsdp", samples=2)
    export(recipe, tmp_path / "one")
    coordinator = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "mllama_jax.run", "tests/exported.py", coordinator]
    everyone = [
        subprocess.Popen(
            [*command, str(number), "2", str(recipe), str(tmp_path / "two")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )
        for number in range(2)
    ]  # fmt: skip
    held = []
    for process in everyone:
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        held.append(json.loads(out))
    (folder,) = (tmp_path / "one").iterdir()
    for file in folder.iterdir():
        assert (tmp_path / "two" / folder.name / file.name).read_bytes() == file.read_bytes()
    (weights,) = folder.glob("*.safetensors")
    sizes = [array.nbytes for array in load_file(weights).values()]
    print(f"{part}: hosts held {held} bytes at most, of {sum(sizes)} written")
    if part != "lora":
        assert held[0] <= 3 * max(sizes) < sum(sizes)
        assert held[1] <= max(sizes)
