"""A model spread over a mesh gives what it gives on one device; rules and meshes that cannot be are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mllama_jax.convert.export import write_hf
from mllama_jax.sharding.rules import PRESETS
from mllama_jax.train.pictures import recipe, tokenizer
from tests.conftest import SMALL
from tests.sharded import CASES

SPREAD = dataclasses.replace(
    SMALL, text=dataclasses.replace(SMALL.text, heads=8, kv_heads=4, layers=4, cross_layers=(1,))
)


def run(devices: int, *args: str) -> str:
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded", *args],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def spread_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight query heads of four key/value heads, which two mesh axes can split."""
    directory = tmp_path_factory.mktemp("spread")
    params = jax.device_get(jax.jit(lambda key: recipe.start(key, SPREAD))(jax.random.key(1)))
    write_hf(directory, params, SPREAD, np.dtype("float32"))
    tokenizer.write(directory)
    return directory


@pytest.mark.parametrize("devices", CASES)
def test_sharded_equals_single(devices: int, spread_directory: Path) -> None:
    """float32 logits within 1e-5 and the same greedy tokens, of an uneven batch with and without pictures."""
    cases = [json.loads(line) for line in run(devices, "compare", str(spread_directory)).splitlines()]
    assert len(cases) == len(CASES[devices])
    for case in cases:
        assert case["error"] <= 1e-5, case
        assert case["tokens"], case


def test_every_preset_is_compared() -> None:
    assert {rules for cases in CASES.values() for rules, _ in cases if isinstance(rules, str)} == set(PRESETS)


def test_what_cannot_be_placed_is_refused(spread_directory: Path) -> None:
    assert run(8, "refuse", str(spread_directory)) == "refused\n"
