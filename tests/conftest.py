"""A small random model in Hugging Face's layout, with a tokenizer, that tests of behaviour share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from PIL import Image

import mllama_jax
from mllama_jax import Mllama, MllamaConfig
from mllama_jax.config import TextConfig, VisionConfig
from mllama_jax.convert.export import write_hf
from mllama_jax.model.mllama import Params
from mllama_jax.train.pictures import recipe, tokenizer

# JAX interprets kernels for GPUs since 0.11, which needs a Python newer than 3.11.
collect_ignore = [] if "force_gpu_interpret_mode" in vars(mosaic_gpu) else ["test_hopper.py", "test_hopper_int4.py"]

SMALL = MllamaConfig(
    text=TextConfig(
        vocab=tokenizer.VOCAB, width=64, layers=6, cross_layers=(1, 4), heads=4, kv_heads=2, head_dim=16, hidden=96,
        context=512,
    ),
    vision=VisionConfig(tile=56, width=32, layers=3, global_layers=1, heads=4, hidden=64, taps=(0, 2)),
    bos=recipe.CONFIG.bos,
    pad=recipe.CONFIG.pad,
    stops=recipe.CONFIG.stops,
)  # fmt: skip


SPREAD = dataclasses.replace(
    SMALL, text=dataclasses.replace(SMALL.text, heads=8, kv_heads=4, layers=4, cross_layers=(1,))
)


assert SMALL.vision is not None
TINY = dataclasses.replace(
    SMALL,
    text=dataclasses.replace(SMALL.text, layers=3, cross_layers=(1,)),
    vision=dataclasses.replace(SMALL.vision, layers=1, global_layers=1, taps=(0,)),
)


@pytest.fixture(scope="session")
def tiny_params() -> Params:
    """Random weights of TINY, which compiles faster, with open gates."""
    return jax.device_get(jax.jit(lambda key: recipe.start(key, TINY))(jax.random.key(1)))


@pytest.fixture(scope="session")
def tiny_directory(tiny_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_hf(directory, tiny_params, TINY, np.dtype("float32"))
    tokenizer.write(directory)
    return directory


@pytest.fixture(scope="session")
def small_params() -> Params:
    """Random weights of SMALL with open gates, such that Meta's layout can hold them."""
    return jax.device_get(jax.jit(lambda key: recipe.start(key, SMALL))(jax.random.key(1)))


@pytest.fixture(scope="session")
def small_directory(small_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    write_hf(directory, small_params, SMALL, np.dtype("float32"))
    tokenizer.write(directory)
    return directory


@pytest.fixture(scope="session")
def spread_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight query heads of four key/value heads, which two mesh axes can split."""
    directory = tmp_path_factory.mktemp("spread")
    params = jax.device_get(jax.jit(lambda key: recipe.start(key, SPREAD))(jax.random.key(1)))
    write_hf(directory, params, SPREAD, np.dtype("float32"))
    tokenizer.write(directory)
    return directory


@pytest.fixture(scope="session")
def small(small_directory: Path) -> Mllama:
    return mllama_jax.load(small_directory, dtype="float32")


@pytest.fixture
def picture() -> Callable[[int, int, int], Image.Image]:
    """A picture of random pixels by (seed, width, height)."""

    def draw(seed: int, width: int = 90, height: int = 60) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))

    return draw
