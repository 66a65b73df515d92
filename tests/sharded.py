"""Run by `test_sharding` with eight CPU devices: the small model sharded over them against the single-device one."""

from __future__ import annotations

import re
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image

import mllama_jax
from mllama_jax.errors import InputError


def main(directory: str) -> None:
    mesh = jax.make_mesh((2, 2, 2), ("data", "kv", "q"), axis_types=(AxisType.Auto,) * 3)
    single, sharded = (
        mllama_jax.load(directory, dtype="float32"),
        mllama_jax.load(directory, dtype="float32", mesh=mesh),
    )
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)) for _ in range(2)]
    tokens, images = [[512, 768, 5, 6, 7], [512, 9, 10, 11, 768]], [pictures[:1], pictures[1:]]
    np.testing.assert_allclose(sharded.logits(tokens, images), single.logits(tokens, images), atol=1e-5)
    settings = {"max_new_tokens": 8, "stop_ids": ()}
    assert sharded.generate_tokens(tokens, images, **settings) == single.generate_tokens(tokens, images, **settings)
    kernel = sharded.params["text"]["layers_0"]["mlp"]["gate_up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 4
    for shape, axes, message in (
        ((8,), ("model",), "expected axes ['data', 'kv', 'q'], got ['model']"),
        ((1, 8, 1), ("data", "kv", "q"), "does not divide over"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            mllama_jax.load(directory, mesh=jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes)))
    print("sharded equals single")


if __name__ == "__main__":
    main(sys.argv[1])
