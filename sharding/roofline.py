"""What a decode step must read, compute and send, and what programs need beside their arguments, by arithmetic."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np

from mllama_jax.config import TextConfig
from mllama_jax.generate.decode import CHUNK
from mllama_jax.model.attention import SCORES_AT_ONCE, largest_divisor
from mllama_jax.model.mllama import Params
from mllama_jax.model.quantize import count
from mllama_jax.sharding.hlo import Collective
from mllama_jax.sharding.mesh import Topology
from mllama_jax.sharding.programs import Programs, Workload
from mllama_jax.sharding.resolve import device_bytes


@dataclasses.dataclass(frozen=True)
class Floor:
    """Below what a decode step cannot take, in seconds, were each the only limit.

    Attributes:
        read: bytes that a device reads in a step.
        bandwidth, compute, interconnect: seconds.
    """

    read: int
    bandwidth: float
    compute: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self.bandwidth, self.compute, self.interconnect)

    @property
    def binds(self) -> str:
        return max(("bandwidth", "compute", "interconnect"), key=lambda name: getattr(self, name))


def floor(topology: Topology, programs: Programs, load: Workload, collectives: Counter[Collective]) -> Floor:
    """The floors of one decode step in which every cache is full; products of int8 run at twice the rate."""
    chip, text, rules = topology.chip, programs.config.text, programs.rules
    read = decode_weights(programs.params, text, pictures=load.images > 0)
    weights, work = device_bytes(read), sum(_work(leaf) for leaf in jax.tree.leaves(read))
    caches = device_bytes((programs.cache(load.slots, load.context), programs.cross(load.slots, load.images)))
    rows = load.slots / rules.parts("batch")
    seen = load.context * len(text.self_layers)
    if programs.config.vision is not None:
        vision = programs.config.vision
        seen += load.images * vision.max_tiles * vision.padded_tokens * len(text.cross_layers)
    heads = text.heads * text.head_dim / rules.parts("heads")
    flops = 2 * rows * work + 4 * rows * heads * seen
    sent = sum(collective.wire * count for collective, count in collectives.items())
    waits = sum(count for collective, count in collectives.items() if collective.group > 1)
    return Floor(
        read=weights + caches,
        bandwidth=(weights + caches) / chip.bandwidth,
        compute=flops / chip.flops,
        interconnect=sent / chip.link + waits * topology.hops * chip.hop,
    )


def _work(leaf: jax.ShapeDtypeStruct) -> float:
    """Numbers of a parameter that a device multiplies with, those of int8 counted half."""
    share = device_bytes(leaf) / (leaf.size * np.dtype(leaf.dtype).itemsize)
    return share * count(leaf) / (2 if leaf.dtype == np.int8 else 1)


def decode_weights(params: Params, config: TextConfig, *, pictures: bool) -> Any:
    """The parameters that a decode step reads whole: not the embedding, nor what only makes image caches.

    Without pictures cross-attention layers are skipped.
    """
    text = dict(params["text"])
    if not config.tied:
        del text["embedding"]
    for i in config.cross_layers:
        if not pictures:
            del text[f"layers_{i}"]
            continue
        layer = dict(text[f"layers_{i}"])
        layer["attention"] = {name: leaf for name, leaf in layer["attention"].items() if name != "kv"}
        text[f"layers_{i}"] = layer
    return text


def expected_collectives(programs: Programs, load: Workload) -> Counter[Collective]:
    """Those of a decode step under tensor parallelism: two all-reduces a layer, gathers of embedding and logits."""
    text, rules = programs.config.text, programs.rules
    group = rules.parts("heads")
    if group == 1:
        return Counter()
    rows, size = load.slots // rules.parts("batch"), programs.model.dtype.itemsize
    layers = text.layers if load.images else len(text.self_layers)
    found = Counter({Collective("all-reduce", rows * text.width * size, group): 2 * layers})
    found[Collective("all-gather", rows * text.width * size, group)] += 1
    found[Collective("all-gather", rows * text.vocab * size, group)] += 1
    return found


def _widened(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a kernel that is unpacked for a product with many rows: bfloat16 has four times those of int4."""
    return 4 * device_bytes(leaf) if leaf.dtype == np.uint8 else 0


def row_temporaries(text: TextConfig) -> int:
    """Room for one more row in decode: its logits and what sampling makes of them, eight times in float32 at most."""
    return 8 * 4 * text.vocab


def temporaries(programs: Programs, load: Workload) -> dict[str, int]:
    """About what each program needs beside its arguments, in bytes a device."""
    text, vision, rules = programs.config.text, programs.config.vision, programs.rules
    size, heads = programs.model.dtype.itemsize, rules.parts("heads")
    rows = load.slots // rules.parts("batch")
    decode = row_temporaries(text) * rows + 2**26
    t = largest_divisor(load.context, CHUNK)
    scores = min(text.heads * t * load.context, SCORES_AT_ONCE) // heads
    prefill = t * size * (4 * text.width + 3 * text.hidden // rules.parts("mlp")) + 10 * scores + 2**27
    prefill += max(map(_widened, jax.tree.leaves(programs.params["text"]["layers_0"])))
    found = {"decode": decode, "prefill": prefill}
    if vision is not None and load.images:
        tokens = vision.max_tiles * vision.padded_tokens
        scores = min(vision.heads * tokens**2, SCORES_AT_ONCE) // rules.parts("vision_heads")
        found["encode"] = tokens * size * (3 * vision.output_width + 2 * text.width) + 10 * scores + 2**27
    return found
