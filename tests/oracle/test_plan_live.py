"""What the TPU's compiler (libtpu) makes of the 90B at full size, on slices that nobody here has."""

from __future__ import annotations

import functools
from collections import Counter

import jax
import pytest

from mllama_jax.config import PRESETS
from mllama_jax.sharding.fit_table import extrapolated, shallow
from mllama_jax.sharding.hlo import Program
from mllama_jax.sharding.mesh import topology
from mllama_jax.sharding.plan import plan, programs_on
from mllama_jax.sharding.programs import Compiled, Programs, Workload, compile_program
from mllama_jax.sharding.resolve import device_bytes
from mllama_jax.sharding.roofline import temporaries

MODEL = PRESETS["90b-instruct"]
SERVED = Workload(slots=8, context=8192, images=1)
LONG = Workload(slots=1, context=131072, images=1)


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


@functools.cache
def decode_step(name: str) -> Compiled:
    return compile_program(programs_on(MODEL, topology(name), "serve").decode(SERVED))


@pytest.mark.parametrize("name", ["v6e:2x4", "v5p:2x2x1", "v6e:16x16"])
def test_the_decode_step_is_clean(name: str) -> None:
    programs, compiled = programs_on(MODEL, topology(name), "serve"), decode_step(name)
    check_collectives(programs, compiled, SERVED)
    check_in_place(programs, compiled, SERVED)


def test_the_collectives_of_tpu7x() -> None:
    programs = programs_on(shallow(MODEL, 5), topology("tpu7x:2x2x1"), "serve")
    check_collectives(programs, compile_program(programs.decode(SERVED)), SERVED)


@pytest.mark.parametrize("name", ["v6e:4x4", "v5p:2x2x2"])
def test_131072_tokens_with_a_picture_fit(name: str) -> None:
    made = plan(MODEL, topology(name), LONG)
    assert made.source == "compiler"
    assert made.fits
    assert made.largest_slots >= 1


def test_depth_extrapolates() -> None:
    """What the fit table extrapolates from 5 and 10 layers is what full depth needs."""
    sizes = extrapolated(MODEL, "v6e:2x4")
    full = decode_step("v6e:2x4")
    assert sum(sizes.values()) == pytest.approx(full.arguments + full.temporaries + full.code, rel=0.01)
