"""Run by `test_sharding` with eight CPU devices: the small model sharded over them against the single-device one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from PIL import Image

import mllama_jax
from mllama_jax.convert.run import convert
from mllama_jax.errors import InputError


def main(directory: str, scratch: str) -> None:
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
    ours = Path(scratch, "ours")
    convert(directory, ours, to="orbax")
    loaded = mllama_jax.load(ours, dtype="float32", mesh=mesh).params
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), sharded.params)
    restored = ocp.StandardCheckpointer().restore(ours, abstract)  # Orbax itself, on the same mesh
    for tree in (loaded, restored):
        for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(sharded.params), strict=True):
            assert one.sharding == other.sharding
            np.testing.assert_array_equal(one, other)
    for shape, axes, message in (
        ((8,), ("model",), "expected axes ['data', 'kv', 'q'], got ['model']"),
        ((1, 8, 1), ("data", "kv", "q"), "does not divide over"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            mllama_jax.load(directory, mesh=jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes)))
    print("sharded equals single")


if __name__ == "__main__":
    main(*sys.argv[1:])
