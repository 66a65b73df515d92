"""The kernel for few rows on Hopper GPUs, interpreted on a CPU: what it loads, who waits for whom, and the result."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from mllama_jax.model import hopper_rows
from mllama_jax.model.hopper_rows import BITS, Plan, in_order
from mllama_jax.model.quantize import QUANTIZERS, widen


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype("bfloat16")


def by_threads(kernel: jax.Array) -> jax.Array:
    """What registers hold of a group of bytes [64, 64 or 128], thread by thread and instruction by instruction."""
    words = jax.lax.bitcast_convert_type(kernel.reshape(64, -1, 4, 4, 4), jnp.uint32)  # row h q v
    bits = BITS[kernel.dtype]
    columns = []
    for h, v, b, p in np.ndindex(bits // 4, 4, 2, 8 // bits):
        t = words[:, h, :, v] >> (8 * b + 4 * p)
        if bits == 4:
            two, less = t & 0x000F000F | 0x43004300, 0x43084308
        else:
            two, less = t & 0x007F007F | 0x43004300, t & 0x00800080 | 0x43004300
        two, less = (jax.lax.bitcast_convert_type(jnp.uint32(each), jnp.bfloat16) for each in (two, less))
        columns.append((two - less).reshape(64, 8))
    return jnp.concatenate(columns, axis=1)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_activations_are_in_the_order_of_numbers(quantize: str) -> None:
    kernel, scale = QUANTIZERS[quantize](normal(64, 128))
    numbers = widen(kernel, jnp.ones_like(scale), jnp.dtype("bfloat16"))
    np.testing.assert_array_equal(in_order(numbers, BITS[kernel.dtype]), by_threads(kernel))


@pytest.mark.parametrize(
    ("quantize", "rows", "outputs", "inputs", "plan"),
    [
        pytest.param("int4", (1, 1), (64,), 128, (1, 1, 1, 1), id="int4, one row, one group"),
        pytest.param("int4", (3,), (2, 64), 768, (1, 1, 1, 6), id="int4, more steps than are loaded ahead"),
        pytest.param("int4", (2, 16), (2, 64), 256, (2, 1, 2, 1), id="int4, 32 rows, two splits"),
        pytest.param("int8", (3,), (2, 64), 768, (1, 1, 1, 6), id="int8, more steps than are loaded ahead"),
        pytest.param("int8", (2, 16), (2, 64), 512, (2, 2, 2, 1), id="int8, 32 rows, two groups, two splits"),
    ],
)
def test_the_kernel_equals_the_product(
    quantize: str,
    rows: tuple[int, ...],
    outputs: tuple[int, ...],
    inputs: int,
    plan: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is in registers the interpreter does not know: that is in plain arithmetic."""

    def sums(w: jax.Array, x: Any) -> jax.Array:
        return jnp.dot(w.astype("float32"), x[...].T.astype("float32"))

    monkeypatch.setattr(hopper_rows, "_widened", lambda numbers, bits: by_threads(numbers[...]))
    monkeypatch.setattr(hopper_rows, "_sums", sums)
    monkeypatch.setattr(Plan, "of", lambda bits, *_: Plan(bits, *plan))
    x, kernel = normal(*rows, inputs), QUANTIZERS[quantize](normal(*outputs, inputs, seed=1))
    force: Any = vars(mosaic_gpu)["force_gpu_interpret_mode"]
    with force():
        ours = hopper_rows.product(x, *kernel)
    jax.clear_caches()
    wanted = jnp.tensordot(x.astype("float32"), widen(*kernel, jnp.dtype("float32")), (-1, -1))
    assert ours.dtype == x.dtype
    assert ours.shape == wanted.shape
    assert float(jnp.abs(ours.astype("float32") - wanted).max()) <= 0.004 * float(jnp.abs(wanted).max())
