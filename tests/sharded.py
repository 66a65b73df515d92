"""Run by `test_sharding` on fake CPU devices: a model on a mesh against the same model on one device."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh
from PIL import Image

import mllama_jax
from mllama_jax import Mllama, SamplingParams
from mllama_jax.config import TextConfig
from mllama_jax.convert.apply import read_config
from mllama_jax.convert.run import convert
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.errors import InputError
from mllama_jax.generate import speculate
from mllama_jax.model import attention, gpu_peers, hopper_int4, layers, tpu_attention
from mllama_jax.model.layers import Axes, Unconstrained, unconstrained
from mllama_jax.model.quantize import from_int4, to_int4
from mllama_jax.processing.chat import Prompt
from mllama_jax.sharding.hlo import KINDS
from mllama_jax.sharding.mesh import make_mesh
from mllama_jax.sharding.programs import Programs, Workload, compile_program
from mllama_jax.sharding.resolve import device_bytes
from mllama_jax.sharding.rules import MeshAxes, Rules, preset_rules

IMAGE = 768

# A dictionary of one's own: heads and hidden widths over one axis, rows over the other.
CUSTOM: dict[str, MeshAxes] = {
    "batch": "x",
    "images": "x",
    "mlp": "y",
    "vision_mlp": "y",
    "vocab": "y",
    "kv_heads": "y",
}

# What is tried on how many devices: (rules, sizes of the mesh axes).
CASES: dict[int, list[tuple[str | dict[str, MeshAxes], dict[str, int]]]] = {
    8: [
        ("serve", {"data": 2, "kv": 2, "q": 2}),
        ("serve", {"data": 1, "kv": 4, "q": 2}),
        ("long-context", {"data": 2, "kv": 2, "q": 2}),
        ("evaluate", {"data": 4, "kv": 2, "q": 1}),
        ("fsdp", {"fsdp": 8}),
        ("fsdp+tensor", {"fsdp": 4, "tensor": 2}),
        (CUSTOM, {"x": 4, "y": 2}),
    ],
    16: [("serve", {"data": 2, "kv": 4, "q": 2}), ("long-context", {"data": 4, "kv": 2, "q": 2})],
    32: [("serve", {"data": 4, "kv": 4, "q": 2})],
}


def rows() -> tuple[list[list[int]], list[list[Image.Image]]]:
    """Five rows, so that no mesh divides them: no picture, one, the same one again, two apart, two together."""
    rng = np.random.default_rng(0)
    sizes = ((60, 90), (50, 50), (200, 40), (30, 130))
    a, b, c, d = (Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes)
    tokens = [[512, 5, 6], [512, IMAGE, 9, 10, 11], [512, 3, IMAGE], [512, IMAGE, 3, IMAGE, 4], [512, IMAGE, IMAGE, 7]]
    return tokens, [[], [a], [a], [b, c], [d, a]]


def answers(model: Mllama) -> tuple[np.ndarray, list[list[int]]]:
    tokens, images = rows()
    real = np.arange(max(map(len, tokens))) < np.array([len(row) for row in tokens])[:, None]
    logits = model.logits(tokens, images)[real]
    return logits, model.generate_tokens(tokens, images, max_new_tokens=8, stop_ids=())


def compare(directory: str) -> None:
    """Every case for this many devices; prints each one's largest error. One device's answers are kept beside."""
    single = Path(directory) / "single.npz"
    if not single.exists():
        logits, made = answers(mllama_jax.load(directory, dtype="float32"))
        np.savez(single, logits=logits, made=np.array(made))
    with np.load(single) as file:
        wanted, tokens = file["logits"], file["made"].tolist()
    for rules, axes in CASES[len(jax.devices())]:
        mesh = make_mesh(axes, jax.devices())
        logits, made = answers(mllama_jax.load(directory, dtype="float32", mesh=mesh, rules=rules))
        error = float(np.abs(logits - wanted).max())
        name = rules if isinstance(rules, str) else "custom"
        print(json.dumps({"rules": name, "mesh": axes, "error": error, "tokens": made == tokens}))


class Emulated(Unconstrained):
    """One device that quantises activations in the parts into which `rules` would split them."""

    def __init__(self, rules: Rules):
        self.rules = rules

    def parts(self, name: str | None) -> int:
        return self.rules.parts(name) if name in ("heads", "mlp") else 1


def quantized(directory: str) -> None:
    """int8 on meshes against one device with the same scales; prints errors, and how far one scale for all is off."""
    single = mllama_jax.load(directory, dtype="float32", quantize="int8")
    convert(directory, f"{directory}/int8", to="orbax", quantize="int8")
    alone, _ = answers(single)
    for axes in ({"data": 2, "kv": 2, "q": 2}, {"data": 1, "kv": 4, "q": 2}):
        mesh = make_mesh(axes, jax.devices())
        split = mllama_jax.load(directory, dtype="float32", mesh=mesh, quantize="int8")
        stored = mllama_jax.load(f"{directory}/int8", dtype="float32", mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, split.params, stored.params)
        logits, made = answers(split)
        model = single.model.clone(constrain=Emulated(preset_rules("serve", single.config, mesh)))
        wanted, tokens = answers(Mllama(model, single.params, None, single.template, Path(directory)))
        error, other = (float(np.abs(wanted - each).max()) for each in (logits, alone))
        print(json.dumps({"mesh": axes, "error": error, "other_scales": other, "tokens": made == tokens}))


def packed(directory: str) -> None:
    """int4 on a mesh against one device; prints the error of logits."""
    mesh = make_mesh({"data": 1, "kv": 4, "q": 2}, jax.devices())
    single, split = (mllama_jax.load(directory, dtype="float32", mesh=each, quantize="int4") for each in (None, mesh))
    kernel = split.params["text"]["layers_0"]["mlp"]["down"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (64, 1024 // 2 // 8)
    tokens = np.random.default_rng(0).integers(0, 512, (3, 10)).tolist()
    wanted, logits = (model.logits(tokens, [[]] * 3) for model in (single, split))
    print(json.dumps({"mesh": dict(mesh.shape), "error": float(np.abs(wanted - logits).max())}))


def _turned(equation: str) -> str:
    inputs, rest = equation.split(",")
    kernel, outputs = rest.split("->")
    return f"{outputs},{kernel}->{inputs}"


def few(directory: str) -> None:
    """int4 for few rows, as on Hopper GPUs, on meshes against one device: errors, and what a device's product is of.

    Their kernel's product is made in float32.
    """
    config, met = read_config(open_checkpoint(Path(directory))), []

    def product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        met.append((x.size // x.shape[-1], scale.size // scale.shape[-1], x.shape[-1]))
        wide = from_int4(kernel, scale, jnp.dtype("float32"))
        return jnp.tensordot(x.astype("float32"), wide, (-1, -1), precision="highest")

    maps: list[tuple[str, tuple[int, ...], Axes]] = [
        ("btd,kghd->btkgh", (4, 2, 64, 512), ("kv_heads", "q_heads", "head_dim", "embed")),
        ("btd,cfd->btcf", (2, 1024, 512), (None, "mlp", "embed")),
        ("btf,df->btd", (64, 1024), ("embed", "mlp")),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "on_hopper", lambda *_: True)
        patch.setattr(hopper_int4, "product", product)
        for preset, axes in (("serve", {"data": 2, "kv": 2, "q": 2}), ("fsdp+tensor", {"fsdp": 4, "tensor": 2})):
            rules, errors = preset_rules(preset, config, make_mesh(axes, jax.devices())), []
            met.clear()
            for equation, shape, names in maps:
                kernel, scale = to_int4(jax.random.normal(jax.random.key(0), shape))
                x = jax.random.normal(jax.random.key(1), (8, 1, shape[-1]), "bfloat16")
                wanted = product(x, kernel, scale)
                met.pop()
                x, kernel, scale = (
                    jax.device_put(each, rules.sharding(*by))
                    for each, by in ((x, ("batch",)), (kernel, names), (scale, names))
                )
                linear = layers.Linear(equation, shape, names, constrain=rules)
                params = {"params": {"kernel": kernel, "scale": scale}}
                y, pull = jax.vjp(jax.jit(functools.partial(linear.apply, params)), x)
                errors.append(float(jnp.abs(y - wanted).max() / jnp.abs(wanted).max()))
                turned = jnp.einsum(_turned(equation), y, from_int4(kernel, scale, y.dtype), precision="highest")
                gradient = pull(y)[0].astype("float32")  # in bfloat16, as x is
                assert float(jnp.abs(gradient - turned).max() / jnp.abs(turned).max()) < 0.01
            print(json.dumps({"mesh": axes, "error": max(errors), "met": list(dict.fromkeys(met))}))


def peers(directory: str) -> None:
    """Decode steps in which devices send each other rows as `gpu_peers` has it, on a mesh against one device.

    JAX's own collectives stand in for its kernels. Prints whether tokens are the same and over which axes something was
    sent, then whether each device knows where the slots of those are that share its rows.
    """
    sent: list[str] = []
    ask, half = gpu_peers.peers, jnp.dtype("bfloat16")
    config = read_config(open_checkpoint(Path(directory)))

    def all_reduce(x: jax.Array, peers: jax.Array, axis: str) -> jax.Array:
        sent.append(axis)
        return jax.lax.psum(x, ("kv", "q"))

    def all_gather(x: jax.Array, peers: jax.Array, axis: str) -> jax.Array:
        sent.append(axis)
        return jax.lax.all_gather(x, ("kv", "q"), axis=x.ndim - 1, tiled=True)

    def as_if_in_half(constrain: Rules, text: TextConfig, dtype: jnp.dtype, rows: int) -> jax.Array | None:
        return ask(constrain, text, half, rows)

    def made(mesh: Mesh | None) -> list[list[int]]:
        model = mllama_jax.load(directory, dtype="float32", mesh=mesh)
        return model.generate_tokens(*rows(), max_new_tokens=8, stop_ids=())

    def knows(sizes: dict[str, int]) -> bool:
        table, slots = gpu_peers._peers(make_mesh(sizes, jax.devices()), ("data",), ("kv", "q"))
        known, at = np.asarray(table)[..., :-1].copy().view(np.uint64), np.zeros(table.shape[:2], np.uint64)
        for shard in slots.addressable_shards:
            at[shard.index[:2]] = shard.data.unsafe_buffer_pointer()
        return bool((known[..., :-1] == at[:, None]).all() and (known[..., -1] == at).all())

    def taken(preset: str = "serve", rows: int = 4, dtype: jnp.dtype = half, **changes: Any) -> bool:
        sizes = {"data": 8, "kv": 1, "q": 1} if preset == "evaluate" else {"data": 2, "kv": 2, "q": 2}
        rules = preset_rules(preset, config, make_mesh(sizes, jax.devices()))
        return ask(rules, dataclasses.replace(config.text, **changes), dtype, rows) is not None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_peers, "on_hopper", lambda *_: True)
        patch.setattr(gpu_peers, "_reach_each_other", lambda _: True)
        patch.setattr(gpu_peers, "all_reduce", all_reduce)
        patch.setattr(gpu_peers, "all_gather", all_gather)
        patch.setattr(gpu_peers, "peers", as_if_in_half)
        meshes: list[dict[str, int]] = [{"data": 2, "kv": 2, "q": 2}, {"data": 1, "kv": 4, "q": 2}]
        same = made(make_mesh(meshes[0], jax.devices())) == made(None)
        print(json.dumps({"tokens": same, "sent": sent, "known": all(map(knows, meshes))}))
        most = 4 * gpu_peers.SUMS["mlp"] // config.text.width  # rows, of two groups
        assert taken()
        assert taken(rows=most, vocab=64)
        others: list[dict[str, Any]] = [
            {"dtype": jnp.dtype("float32")},
            {"rows": 3},
            {"rows": most + 2, "vocab": 64},
            {"vocab": config.text.vocab + 4},
            {"tied": True},
            {"preset": "long-context"},
            {"preset": "evaluate"},
        ]
        assert not any(taken(**other) for other in others)


def cached(directory: str) -> None:
    """int8 caches on meshes against one device; prints errors, and how far caches in float32 are off."""
    wanted, tokens = answers(mllama_jax.load(directory, dtype="float32", cache="int8"))
    whole, _ = answers(mllama_jax.load(directory, dtype="float32"))
    for rules in ("serve", "long-context"):
        mesh = make_mesh({"data": 2, "kv": 2, "q": 2}, jax.devices())
        logits, made = answers(mllama_jax.load(directory, dtype="float32", mesh=mesh, rules=rules, cache="int8"))
        error, other = (float(np.abs(wanted - each).max()) for each in (logits, whole))
        print(json.dumps({"rules": rules, "error": error, "float32": other, "tokens": made == tokens}))


def drafted(directory: str) -> None:
    """Answers by a model's own guesses, which see no pictures, on a mesh and on one device; prints forwards of both."""
    tokens, images = rows()
    prompts = [Prompt(*row) for row in zip(tokens, images, strict=True)]
    params = [SamplingParams(max_new_tokens=11, stop_ids=(), temperature=i % 2, seed=i) for i in range(len(prompts))]
    forwards, found, dispatch = [], [], speculate.decode

    def counting(*args: Any, **options: Any) -> Any:
        result = dispatch(*args, **options)
        forwards.append(int(result[4]))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculate, "decode", counting)
        for mesh in (None, make_mesh({"data": 2, "kv": 2, "q": 2}, jax.devices())):
            model = mllama_jax.load(directory, dtype="float32", mesh=mesh)
            found.append([answer.tokens for answer in model._answers(prompts, params, lookup=4, draft=model)])
    print(json.dumps({"tokens": found[0] == found[1], "forwards": forwards}))


def kernels(directory: str) -> None:
    """A TPU's attention kernels, interpreted, on one device and on a mesh against XLA; prints errors."""
    wanted, tokens = answers(mllama_jax.load(directory, dtype="float32"))
    choose, chosen, anyhow = attention.back_end, set(), cast(Any, True)

    def half(q: jax.Array, *others: Any) -> attention.BackEnd:
        """What is chosen for bfloat16."""
        found = choose(q.astype("bfloat16"), *others)
        chosen.add(getattr(found, "func", found))
        return found

    with pytest.MonkeyPatch.context() as patch, pltpu.force_tpu_interpret_mode(anyhow):
        patch.setattr(attention, "back_end", half)
        patch.setattr(tpu_attention, "MANY", 1)
        for kind in (Unconstrained, Rules):
            patch.setattr(kind, "platform", "tpu")
        for axes in (None, {"data": 2, "kv": 2, "q": 2}):
            chosen.clear()
            mesh = None if axes is None else make_mesh(axes, jax.devices())
            logits, made = answers(mllama_jax.load(directory, dtype="float32", mesh=mesh))
            error, names = float(np.abs(logits - wanted).max()), sorted(each.__name__ for each in chosen)
            print(json.dumps({"mesh": axes, "error": error, "tokens": made == tokens, "chosen": names}))


def refuse(directory: str) -> None:
    """What cannot be placed is refused in one line, before anything is loaded."""

    def refused(
        message: str, mesh: Mesh, rules: str | dict[str, MeshAxes] = "serve", quantize: str | None = None
    ) -> None:
        with pytest.raises(InputError, match=message) as error:
            mllama_jax.load(directory, mesh=mesh, rules=rules, quantize=quantize)
        assert "\n" not in str(error.value)

    def mesh(*shape: int, axes: tuple[str, ...] = ("data", "kv", "q")) -> Mesh:
        return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))

    refused(r"expected axes \['data', 'kv', 'q'\], got \['model'\]", mesh(8, axes=("model",)))
    refused(
        r"text/layers_0/attention/kv/kernel \[2, 4, 16, 64\] on mesh \(data 1, kv 8, q 1\): kv_heads of size 4 does "
        r"not divide over kv = 8; \[1, 2, 4\] would",
        mesh(1, 8, 1),
    )
    refused(
        r"text/layers_0/mlp/down/kernel \[64, 96\] on mesh \(x 8\): .* split twice over \['x'\], by \['embed', 'mlp'\]",
        mesh(8, axes=("x",)),
        {"embed": "x", "mlp": "x"},
    )
    refused(
        r"text/layers_0/attention/out/scale \[64, 1\] on mesh \(data 4, kv 2, q 1\): heads of size 1 does not divide "
        r"over kv x q = 2; \[1\] would; int4 splits between groups of inputs",
        mesh(4, 2, 1),
        quantize="int4",
    )
    refused("unknown logical axes \\['head'\\]; known are batch, ", mesh(8, axes=("x",)), {"head": "x"})
    refused("preset 'fast' is not known; known are serve, ", mesh(2, 2, 2), "fast")
    with pytest.raises(InputError, match="takes 4 devices, there are 8"):
        make_mesh({"data": 1, "kv": 4, "q": 1}, jax.devices())
    split = mllama_jax.load(directory, dtype="float32", mesh=mesh(2, 2, 2))
    with pytest.raises(InputError, match="a chat is one row and the mesh splits rows in 2"):
        split.chat()
    rows = Rules.of(mesh(2, 2, 2), {"batch": ("data", "kv", "q")})
    for other, message in ((unconstrained, "on the same mesh"), (rows, "split rows in 8 and the model's in 2")):
        draft = dataclasses.replace(split, model=split.model.clone(constrain=other))
        with pytest.raises(InputError, match=f"draft: .*{message}"):
            split.generate([[{"role": "user", "content": "hi"}]], lookup=4, draft=draft)
    kernel = split.params["text"]["layers_0"]["mlp"]["gate_up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 4
    print("refused")


def restore(directory: str) -> None:
    """Our layout loads onto a mesh as another layout does, and as Orbax itself restores it."""
    ours, mesh = Path(directory, "ours"), make_mesh({"data": 2, "kv": 2, "q": 2}, jax.devices())
    convert(directory, ours, to="orbax")
    loaded, sharded = (mllama_jax.load(path, dtype="float32", mesh=mesh).params for path in (ours, directory))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), sharded)
    restored = ocp.StandardCheckpointer().restore(ours, abstract)
    for tree in (loaded, restored):
        for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(sharded), strict=True):
            assert one.sharding == other.sharding
            np.testing.assert_array_equal(one, other)
    print("restored")


def clean(directory: str) -> None:
    """The compiled decode step: two all-reduces a layer, gathers of embedding and logits; caches in their place."""
    config = read_config(open_checkpoint(Path(directory)))
    mesh, load = make_mesh({"data": 1, "kv": 4, "q": 2}, jax.devices()), Workload(4, 64, 1)
    programs = Programs(config, preset_rules("serve", config, mesh), "float32")
    compiled = compile_program(programs.decode(load), options={})
    counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for collective, count in compiled.collectives.items():
        assert collective.group == 8
        counts[collective.kind] += count
    assert +counts == {"all-reduce": 2 * config.text.layers, "all-gather": 2}
    assert compiled.aliased >= device_bytes(programs.cache(load.slots, load.context))
    print("clean")


if __name__ == "__main__":
    for task in (compare, quantized, packed, few, peers, cached, drafted, kernels, refuse, restore, clean):
        if task.__name__ == sys.argv[1]:
            task(sys.argv[2])
