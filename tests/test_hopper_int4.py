"""The kernel for int4 on Hopper GPUs, interpreted on a CPU: what it loads, when, who waits for whom, and the result."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from mllama_jax.model import hopper_int4
from mllama_jax.model.hopper_int4 import Plan, in_order
from mllama_jax.model.quantize import from_int4, to_int4


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype("bfloat16")


def by_threads(packed: jax.Array) -> jax.Array:
    """What registers hold of bytes [64, 64], thread by thread and instruction by instruction."""
    words = jax.lax.bitcast_convert_type(packed.reshape(64, 4, 4, 4), jnp.uint32)  # row q v
    columns = []
    for v, shift in np.ndindex(4, 4):
        two = words[:, :, v] >> (0, 4, 8, 12)[shift] & 0x000F000F | 0x43004300
        columns.append((jax.lax.bitcast_convert_type(two, jnp.bfloat16) - jnp.bfloat16(136)).reshape(64, 8))
    return jnp.concatenate(columns, axis=1)


def test_activations_are_in_the_order_of_numbers() -> None:
    packed, scale = to_int4(normal(64, 128))
    numbers = from_int4(packed, jnp.ones_like(scale), jnp.dtype("bfloat16"))
    np.testing.assert_array_equal(in_order(numbers), by_threads(packed))


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "plan"),
    [
        pytest.param((1, 1), (64,), 128, Plan(1, 1, 1, 1), id="one row, one group"),
        pytest.param((3,), (2, 64), 768, Plan(1, 1, 1, 6), id="more steps than are loaded ahead"),
        pytest.param((2, 16), (2, 64), 256, Plan(2, 1, 2, 1), id="32 rows, two splits"),
    ],
)
def test_the_kernel_equals_the_product(
    rows: tuple[int, ...], outputs: tuple[int, ...], inputs: int, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in registers the interpreter does not know: that is in plain arithmetic."""

    def sums(w: jax.Array, x: Any) -> jax.Array:
        return jnp.dot(w.astype("float32"), x[...].T.astype("float32"))

    monkeypatch.setattr(hopper_int4, "_widened", lambda packed: by_threads(packed[...]))
    monkeypatch.setattr(hopper_int4, "_sums", sums)
    monkeypatch.setattr(Plan, "of", lambda *_: plan)
    x, kernel = normal(*rows, inputs), to_int4(normal(*outputs, inputs, seed=1))
    force: Any = vars(mosaic_gpu)["force_gpu_interpret_mode"]
    with force():
        ours = hopper_int4.product(x, *kernel)
    jax.clear_caches()
    wanted = jnp.tensordot(x.astype("float32"), from_int4(*kernel, jnp.dtype("float32")), (-1, -1))
    assert ours.dtype == x.dtype
    assert ours.shape == wanted.shape
    assert float(jnp.abs(ours.astype("float32") - wanted).max()) <= 0.004 * float(jnp.abs(wanted).max())
