"""Training on meshes of four fake devices is training on one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from mllama_jax.convert.export import write_hf
from mllama_jax.train.pictures import recipe as pictures
from mllama_jax.train.pictures import tokenizer
from tests.conftest import TINY
from tests.training import line, write

ROOT = Path(__file__).parents[2]

# The many programs are run for moments only: compiled fast, not well.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"


def test_meshes_train_as_one_device(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, heads=8, kv_heads=4))
    params = jax.device_get(jax.jit(lambda key: pictures.start(key, config))(jax.random.key(1)))
    write_hf(tmp_path / "model", params, config, np.dtype("float32"))
    tokenizer.write(tmp_path / "model")
    chats = [line(i) for i in range(36) if i % 3 < 2]  # of one shape: each compiles
    settings = {"samples": 4, "accumulate": 2, "steps": 20, "learning_rate": 1e-2}
    recipe = write(tmp_path / "data", chats, tmp_path / "model", **settings)
    run = subprocess.run(
        [sys.executable, "-m", "tests.sharded_training", str(recipe)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    *found, refused = [json.loads(each) for each in run.stdout.splitlines()]
    assert len(found) == 3
    for each in found:
        assert each["error"] <= 1e-5, each
        assert each["fell"] > 0.01, each
        if each["preset"].startswith("fsdp"):
            assert each["held"] < 0.4, each  # a quarter of the optimiser's moments, and what cannot be split
    assert refused == "samples: expected a multiple of the 4 parts in which the mesh splits rows, got 6"
