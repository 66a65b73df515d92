"""`mllama check`: whether this machine computes what Meta's code computes. The first thing to run on new hardware."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mllama_jax import load
from mllama_jax.cli import SHIPPED
from mllama_jax.config import PRESETS, MllamaConfig
from mllama_jax.convert.apply import read_config
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.demo import ask, questions
from mllama_jax.generate import decode
from mllama_jax.generate.sampling import SamplingParams, Settings
from mllama_jax.model.attention import InSpan, UpTo, attention, attention_weights
from mllama_jax.model.quantize import Int8
from mllama_jax.processes import versions
from mllama_jax.sharding.fit_table import shallow
from mllama_jax.sharding.mesh import Topology, make_mesh, slices_of, topology_of
from mllama_jax.sharding.programs import Programs, Workload
from mllama_jax.sharding.roofline import expected_collectives, floor
from mllama_jax.sharding.rules import mesh_axes, preset_rules

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


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast decode steps are on all devices together, random weights.

    Attributes:
        model: whose shapes.
        milliseconds: of a step of `rows` rows, the best of a few dispatches.
        floor: below what it cannot be by the planner, milliseconds; None where it knows not this kind of device.
    """

    model: str
    rows: int
    milliseconds: float
    floor: float | None

    def describe(self) -> str:
        """The pace as a line."""
        told = f"decode: {self.milliseconds:.2f} ms a step of {self.rows} rows {self.model}; "
        if self.floor is None:
            return told + "no floor: the planner does not know these devices"
        return told + f"the plan's floor is {self.floor:.2f} ms, {self.floor / self.milliseconds:.0%} of it"


def environment() -> dict[str, Any]:
    """What a reader of the report needs to know of the machine."""
    device = jax.devices()[0]
    return {
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        **versions(),
        "system": platform.platform(),
    }


def findings() -> Iterator[Finding]:
    """Every comparison, as it is made."""
    yield from collectives()
    yield from attentions()
    for dtype in LIMITS:
        yield from parity(dtype)


def pace() -> Pace:
    """Time decode steps: of 10 of the 11B's 40 layers where the planner knows the devices, else of what ships."""
    place = topology_of(jax.devices())
    if place is None:
        return timed(read_config(open_checkpoint(SHIPPED)), "of the checkpoint that ships", None)
    return timed(shallow(PRESETS["11b-instruct"], 10), "of 10 of the 11B's 40 layers", place)


def timed(config: MllamaConfig, name: str, place: Topology | None) -> Pace:
    """The pace of a model's decode steps in bfloat16: eight rows or more of a thousand positions and a picture each."""
    axes = mesh_axes("serve", config, jax.device_count(), slices=slices_of(jax.devices()))
    programs = Programs(config, preset_rules("serve", config, make_mesh(axes, jax.devices())))
    load = Workload(8 * axes["data"], min(1024, config.text.context), 1)
    abstract = programs.decode_arguments(load)
    places = jax.tree.map(lambda x: x.sharding, abstract)
    fill = jax.jit(lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), abstract), out_shardings=places)
    params, state, cross = fill()
    state = dataclasses.replace(state, done=jnp.zeros_like(state.done))
    endless = SamplingParams(max_new_tokens=2**30, stop_ids=())
    settings = Settings.of([endless] * load.slots, [[]] * load.slots, (), config.text.vocab)
    seconds = []
    for _ in range(4):  # the first compiles
        start = time.perf_counter()
        state, made, columns = decode.decode(programs.model, params, state, cross, settings, steps=decode.STEPS, top=0)
        decode.on_host(made)
        seconds.append((time.perf_counter() - start) / int(columns))
    limits = floor(place, programs, load, expected_collectives(programs, load)).seconds if place else None
    return Pace(name, load.slots, 1e3 * min(seconds[1:]), limits and 1e3 * limits)


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
    """The attention that this machine takes for each use of it, beside plain float32 einsums."""
    tiles = InSpan(jnp.array([[[0, 2**30], [3, 2**30], [0, 0], [0, 200]]] * 2), tokens=257, padded=264)
    uses = {
        "decode": (jnp.array([2047]), UpTo(2048), 2048),
        "prompt": (jnp.arange(512), UpTo(512, first=True), 512),
        "later part of a prompt": (1024 + jnp.arange(512), UpTo(2048), 2048),
        "decode to tiles": (jnp.array([5]), tiles, 4 * tiles.padded),
        "prompt to tiles": (jnp.arange(512), tiles, 4 * tiles.padded),
        "vision": (jnp.arange(1032), None, 1032),
    }
    for use, (positions, visible, keys) in uses.items():
        draw, queries = (
            iter(jax.random.split(jax.random.key(keys), 3)),
            jnp.broadcast_to(positions, (2, len(positions))),
        )
        q = jax.random.normal(next(draw), (2, len(positions), 2, 4, 128))
        k, v = (jax.random.normal(next(draw), (2, 2, keys, 128)) for _ in range(2))
        mask = None if visible is None else visible(queries)
        plain = jnp.einsum("bkgts,bksh->btkgh", attention_weights(q, k, mask), v, precision="highest")
        attend = jax.jit(lambda q, k, v, queries=queries, visible=visible: attention(q, k, v, queries, visible))

        def finding(what: str, limit: float, ours: jax.Array, wanted: jax.Array) -> Finding:
            error = float(jnp.abs(ours.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max())
            return Finding(f"{what}: error beside the largest value", error, limit)

        for dtype, limit in LIMITS.items():
            yield finding(f"{dtype} attention, {use}", limit, attend(*(x.astype(dtype) for x in (q, k, v))), plain)
        if len(positions) == 1:
            k, v = Int8.of(k), Int8.of(v)
            wide = (x.widen(jnp.dtype("float32")) for x in (k, v))
            plain = jnp.einsum(
                "bkgts,bksh->btkgh", attention_weights(q, next(wide), mask), next(wide), precision="highest"
            )
            for dtype, limit in LIMITS.items():
                yield finding(f"{dtype} attention, {use}, int8 cache", limit, attend(q.astype(dtype), k, v), plain)


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
