"""What the TPU's compiler (libtpu) makes of the 90B at full size, on slices that nobody here has."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from mllama_jax.cli import main
from mllama_jax.config import PRESETS
from mllama_jax.sharding.fit_table import extrapolated, shallow
from mllama_jax.sharding.hlo import Program
from mllama_jax.sharding.mesh import topology
from mllama_jax.sharding.plan import plan, programs_on
from mllama_jax.sharding.programs import Compiled, Programs, Workload, compile_program
from mllama_jax.sharding.resolve import device_bytes
from mllama_jax.sharding.roofline import temporaries
from mllama_jax.train.plan import train_plan
from tests.conftest import SMALL

MODEL = PRESETS["90b-instruct"]
SERVED = Workload(slots=8, context=8192, images=1)
MINIMUM = "jax_persistent_cache_min_compile_time_secs"
CORES = 2
LONG = Workload(slots=1, context=131072, images=1)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Of a hundred layers what JAX keeps, traced and lowered, is a gigabyte for each program."""
    yield
    jax.clear_caches()


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
    kernels = [device_bytes(leaf) for leaf in own[0] if len(leaf.shape) > 1 and leaf.dtype != jnp.float32]
    layer = device_bytes(own[1][0])
    assert not Program(compiled.text).copies(min(*kernels, layer))
    assert compiled.aliased >= device_bytes(own[1])
    assert compiled.temporaries < temporaries(programs, load)["decode"] + layer


def check_stays_small(programs: Programs, compiled: Compiled, load: Workload) -> None:
    """No int8 kernel exists in another type in the device's memory."""
    kernels = {math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(programs.params["text"])
               if leaf.dtype == jnp.int8}  # fmt: skip
    cache = programs.cache(load.slots, load.context)[0].k
    own = f"bf16[{','.join(map(str, cache.sharding.shard_shape(cache.shape)))}]"
    for each in Program(compiled.text).executed():
        wide = re.findall(r"\b(bf16|f32|s32)\[([\d,]+)\]", each.shape) if each.opcode in ("fusion", "convert") else []
        for kind, dims in wide:
            found = math.prod(map(int, dims.split(",")))
            assert found not in kernels or f"{kind}[{dims}]" == own, each


def timed(lowered: jax.stages.Lowered) -> Compiled:
    """With the processor's seconds for the clock's, which count what runs beside a test."""
    start = time.process_time()
    return dataclasses.replace(compile_program(lowered), seconds=time.process_time() - start)


@functools.cache
def decode_step(name: str, quantize: str | None = None) -> Compiled:
    return timed(programs_on(MODEL, topology(name), "serve", quantize=quantize).decode(SERVED))


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        *(("v6e:2x4", None), ("v5p:2x2x1", None), ("tpu7x:2x2x1", None), ("v6e:16x16", None)),
        *(("v6e:2x4", "int8"), ("v5e:4x4", "int8")),
    ],
)
def test_the_decode_step_is_clean(name: str, quantize: str | None) -> None:
    programs, compiled = programs_on(MODEL, topology(name), "serve", quantize=quantize), decode_step(name, quantize)
    check_collectives(programs, compiled, SERVED)
    check_in_place(programs, compiled, SERVED)
    if quantize:
        check_stays_small(programs, compiled, SERVED)
    assert compiled.seconds < CORES * (90 if name.startswith("tpu7x") else 60)


def test_prefill_compiles_in_two_minutes() -> None:
    load = dataclasses.replace(SERVED, context=2048)
    assert timed(programs_on(MODEL, topology("v6e:2x4"), "serve").prefill(load)).seconds < CORES * 120


@pytest.mark.parametrize("name", ["v6e:2x4", "v5e:4x4"])
def test_packed_kernels_are_not_laid_out_anew(name: str) -> None:
    """At 5 of 100 layers, of which one looks at pictures."""
    programs = programs_on(shallow(MODEL, 5), topology(name), "serve", quantize="int4")
    compiled = compile_program(programs.decode(SERVED))
    check_collectives(programs, compiled, SERVED)
    check_in_place(programs, compiled, SERVED)


@pytest.mark.parametrize("name", ["v6e:2x4", "v5p:2x2x1"])
def test_int8_caches_stay_small_and_in_place(name: str) -> None:
    """At 5 of 100 layers: no cache exists in another type, nor twice, and collectives are those of wide caches."""
    programs = programs_on(shallow(MODEL, 5), topology(name), "serve", cache="int8")
    compiled, cross = compile_program(programs.decode(SERVED)), programs.cross(SERVED.slots, SERVED.images)
    check_collectives(programs, compiled, SERVED)
    check_in_place(programs, compiled, SERVED)
    assert cross is not None
    layers = [*programs.cache(SERVED.slots, SERVED.context), *cross.layers]
    shapes = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(layers) if leaf.dtype == jnp.int8}
    found = re.findall(r"\b(?:bf16|f32|s32)\[([\d,]+)\]", " ".join(e.shape for e in Program(compiled.text).executed()))
    assert not {tuple(n for n in shape if n > 1) for shape in shapes} & {
        tuple(n for n in map(int, dims.split(",")) if n > 1) for dims in found
    }


@pytest.mark.parametrize(("name", "quantize"), [("v6e:4x4", "int8"), ("v5p:2x2x2", None)])
def test_131072_tokens_with_a_picture_fit(name: str, quantize: str | None) -> None:
    made = plan(MODEL, topology(name), LONG, quantize=quantize)
    assert made.source == "compiler"
    assert made.fits
    assert made.largest_slots >= 1


def test_a_cache_of_compiled_programs_is_left_alone(tmp_path: Path) -> None:
    was = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", MINIMUM)}
    programs = programs_on(shallow(MODEL, 4), topology("v6e:2x4"), "serve")
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        jax.config.update(MINIMUM, 0)
        reset_cache()
        first, second = (compile_program(programs.decode(SERVED)) for _ in range(2))
    finally:
        for name, value in was.items():
            jax.config.update(name, value)
        reset_cache()
    assert first.temporaries == second.temporaries
    assert not list(tmp_path.iterdir())


def test_depth_extrapolates() -> None:
    """What the fit table extrapolates from 5 and 10 layers is what full depth needs."""
    sizes = extrapolated(MODEL, "v6e:2x4")
    full = decode_step("v6e:2x4")
    assert sum(sizes.values()) == pytest.approx(full.arguments + full.temporaries + full.code, rel=0.01)


@pytest.mark.parametrize("name", ["2xv6e:2x4", "2xv5p:2x2x1"])
def test_only_data_crosses_slices(name: str) -> None:
    mesh = programs_on(MODEL, topology(name), "serve").rules.mesh
    assert mesh.axis_names == ("data", "kv", "q")
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.shape[0] == 2
    assert [set(own.ravel()) for own in slices] == [{0}, {1}]


@pytest.mark.parametrize(("name", "stand_in"), [("v6e:2x2", "v6e:2x2"), ("h100:4", "v5p:2x2x1")])
def test_a_training_step_is_planned(name: str, stand_in: str) -> None:
    """Of GPUs by as many v5p chips; what their cards hold decides."""
    made = train_plan(SMALL, topology(name), Workload(slots=4, context=128, images=1), "lora", "fsdp")
    assert (made.stand_in, made.mesh, made.fits) == (stand_in, {"fsdp": 4}, True)
    assert made.needed == made.frozen + made.trained + made.temporaries < made.usable == int(topology(name).chip.hbm)
    assert min(made.frozen, made.trained, made.temporaries) > 0


def test_a_plan_of_training_is_told(small_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, what = ["--topology", "v6e:2x2"], ["--train", "lora", "--slots", "4", "--context", "128"]
    asked = ["plan", str(small_directory), *where, *what]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "lora, on v6e:2x2" in told
    assert re.search(r"needed +\d+\.\d\d  of 31\.24: fits", told)
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
