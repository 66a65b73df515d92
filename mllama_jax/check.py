"""`mllama check`: whether this machine computes what Meta's code computes. The first thing to run on new hardware."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mllama_jax import load
from mllama_jax.cli import SHIPPED
from mllama_jax.demo import ask, questions
from mllama_jax.model.attention import attention, attention_weights

GOLDENS = Path(__file__).parent / "assets" / "check.npz"
STRIDE = 97  # of the features that are kept there
LIMITS = {"float32": 1e-4, "bfloat16": 0.05}  # of the largest value


@dataclasses.dataclass(frozen=True)
class Finding:
    """One comparison: `measured` must be at most `limit`."""

    name: str
    measured: float
    limit: float

    @property
    def ok(self) -> bool:
        return bool(self.measured <= self.limit)  # not so for NaN


def environment() -> dict[str, Any]:
    """What a reader of the report needs to know of the machine."""
    device = jax.devices()[0]
    return {
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        **{package: _version(package) for package in ("mllama-jax", "jax", "jaxlib", "flax", "numpy")},
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its folder
        return "not installed"


def findings() -> Iterator[Finding]:
    """Every comparison, as it is made."""
    yield from collectives()
    yield from attentions()
    for dtype in LIMITS:
        yield from parity(dtype)


def parity(dtype: str) -> Iterator[Finding]:
    """The shipped checkpoint beside what Meta's code made of it (float32, CPU), over all bundled questions."""
    model = load(SHIPPED, dtype=dtype)
    with np.load(GOLDENS) as file:
        golden = dict(file)
    conversations = [ask(picture, question) for picture, question, _ in questions()]
    prompts = [model.prompt(conversation) for conversation in conversations]
    features = model.encode_images([prompt.images for prompt in prompts])
    errors: dict[str, list[float]] = {"features": [], "logits": []}
    for k, prompt in enumerate(prompts):
        tokens, start = golden[f"tokens_{k}"], len(prompt.tokens)
        logits = model.logits(tokens[None], [prompt.images])[0, start - 1 : -1]
        for name, ours in (("features", features[k].ravel()[::STRIDE]), ("logits", logits)):
            theirs = golden[f"{name}_{k}"]
            errors[name].append(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    for name, each in errors.items():
        yield Finding(f"{dtype} {name}: error beside the largest value", max(each), LIMITS[dtype])
    answers = model.generate(conversations)
    wrong = sum(
        answer.tokens != golden[f"tokens_{k}"][len(prompt.tokens) :].tolist()
        for k, (answer, prompt) in enumerate(zip(answers, prompts, strict=True))
    )
    yield Finding(f"{dtype} answers that differ, of {len(answers)}", wrong, 0)


def attentions() -> Iterator[Finding]:
    """The attention that this machine takes, at the shapes of each of its uses, beside plain float32 einsums."""
    shapes = {"decode": (2, 1, 2048), "prefill": (1, 512, 512), "vision": (1, 1032, 1032)}
    for use, (rows, queries, keys) in shapes.items():
        draw = iter(jax.random.split(jax.random.key(queries), 3))
        q = jax.random.normal(next(draw), (rows, queries, 2, 4, 128))
        k, v = (jax.random.normal(next(draw), (rows, 2, keys, 128)) for _ in range(2))
        last = keys - 1 if use == "vision" else jnp.arange(queries) + keys - queries  # the last key that a query sees
        last = jnp.broadcast_to(last, (rows, queries))

        def visible(last: jax.Array, keys: int = keys) -> jax.Array:
            return jnp.arange(keys) <= last[:, :, None]

        plain = jnp.einsum("bkgts,bksh->btkgh", attention_weights(q, k, visible(last)), v, precision="highest")
        for dtype, limit in LIMITS.items():
            halves = (x.astype(dtype) for x in (q, k, v))
            ours = jax.jit(attention, static_argnums=4)(*halves, last, visible).astype(jnp.float32)
            error = float(jnp.abs(ours - plain).max() / jnp.abs(plain).max())
            yield Finding(f"{dtype} attention, {use}: error beside the largest value", error, limit)


def collectives() -> Iterator[Finding]:
    """Sums, gathers and exchanges over all devices beside the same in NumPy."""
    n = jax.device_count()
    mesh = jax.make_mesh((n,), ("x",), axis_types=(AxisType.Auto,))
    rows, columns, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), (None, "x"), ()))
    numbers = np.arange(n * n * 6, dtype=np.float32).reshape(n, n * 6)
    placed = jax.make_array_from_callback(numbers.shape, rows, lambda index: numbers[index])
    for name, function, target, expected in (
        ("all-reduce", lambda x: x.sum(axis=0), whole, numbers.sum(axis=0)),
        ("all-gather", lambda x: x + 1, whole, numbers + 1),
        ("all-to-all", lambda x: x * 2, columns, numbers * 2),
    ):
        result = jax.jit(function, out_shardings=target)(placed)
        wrong = sum(int((np.asarray(shard.data) != expected[shard.index]).sum()) for shard in result.addressable_shards)
        yield Finding(f"{name} over {n} devices: values that differ", wrong, 0)
