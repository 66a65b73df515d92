"""What the TPU's compiler (libtpu) makes of the 90B at full size, on slices that nobody here has."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import pytest

from mllama_jax.config import PRESETS, MllamaConfig
from mllama_jax.sharding.hlo import Program
from mllama_jax.sharding.mesh import topology
from mllama_jax.sharding.plan import plan, programs_on
from mllama_jax.sharding.programs import Compiled, Programs, Workload, compile_program
from mllama_jax.sharding.resolve import device_bytes
from mllama_jax.sharding.roofline import temporaries

MODEL = PRESETS["90b-instruct"]
SERVED = Workload(slots=8, context=8192, images=1)
LONG = Workload(slots=1, context=131072, images=1)


def shallow(layers: int) -> MllamaConfig:
    text = MODEL.text
    cross = tuple(i for i in text.cross_layers if i < layers)
    return dataclasses.replace(MODEL, text=dataclasses.replace(text, layers=layers, cross_layers=cross))


def check_collectives(programs: Programs, compiled: Compiled, load: Workload) -> None:
    """Two all-reduces a layer over all that share a row; one more exchange for the embedding, one for the logits."""
    text, parts = programs.config.text, programs.rules.parts
    rows = load.slots // parts("batch")
    counts: Counter[tuple[str, int]] = Counter()
    for collective, count in compiled.collectives.items():
        if collective.bytes > 4:  # over `data`, whether all rows are done
            assert collective.group == parts("heads"), collective
            counts[collective.kind, collective.bytes] += count
    layer = "all-reduce", rows * text.width * 2
    assert counts.pop(layer) == 2 * text.layers
    assert sum(counts.values()) == 2, counts


def check_in_place(programs: Programs, compiled: Compiled, load: Workload) -> None:
    """No weight and no cache is copied within the device's memory; the caches are where they were."""
    own = [jax.tree.leaves(tree) for tree in (programs.params["text"], programs.cache(load.slots, load.context))]
    kernels = [device_bytes(leaf) for leaf in own[0] if len(leaf.shape) > 1]
    layer = device_bytes(own[1][0])
    logits = 4 * programs.config.text.vocab * load.slots // programs.rules.parts("batch")
    least = min(*kernels, layer)
    assert least > logits  # which sampling may copy
    assert not Program(compiled.text).copies(least)
    assert compiled.aliased >= device_bytes(own[1])
    assert compiled.temporaries < temporaries(programs, load)["decode"] + layer


@pytest.mark.parametrize("name", ["v6e:2x4", "v5p:2x2x1", "v6e:16x16"])
def test_the_decode_step_is_clean(name: str) -> None:
    programs = programs_on(MODEL, topology(name), "serve")
    compiled = compile_program(programs.decode(SERVED))
    check_collectives(programs, compiled, SERVED)
    check_in_place(programs, compiled, SERVED)


def test_the_collectives_of_tpu7x() -> None:
    programs = programs_on(shallow(10), topology("tpu7x:2x2x1"), "serve")
    check_collectives(programs, compile_program(programs.decode(SERVED)), SERVED)


@pytest.mark.parametrize("name", ["v6e:4x4", "v5p:2x2x2"])
def test_131072_tokens_with_a_picture_fit(name: str) -> None:
    made = plan(MODEL, topology(name), LONG)
    assert made.source == "compiler"
    assert made.fits
    assert made.largest_slots >= 1


def test_depth_extrapolates() -> None:
    """Arguments of 5 and 10 layers give those of 15, so that tables need no full depth."""
    five, ten, fifteen = (
        compile_program(programs_on(shallow(n), topology("v6e:2x4"), "serve").decode(SERVED)).arguments
        for n in (5, 10, 15)
    )
    assert fifteen == pytest.approx(2 * ten - five, rel=1e-4)
