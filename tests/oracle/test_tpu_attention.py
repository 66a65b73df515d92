"""Attention's kernels as the TPU's compiler (libtpu) takes them, for chips that nobody here has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from mllama_jax.config import PRESETS
from mllama_jax.model.attention import InSpan, UpTo, attention
from mllama_jax.model.layers import Unconstrained
from mllama_jax.sharding.fit_table import shallow
from mllama_jax.sharding.hlo import Program
from mllama_jax.sharding.mesh import topology
from mllama_jax.sharding.plan import programs_on
from mllama_jax.sharding.programs import Compiled, Workload, compile_program
from mllama_jax.sharding.rules import Rules

KERNEL = 'custom_call_target="tpu_custom_call"'
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
LOAD = Workload(slots=8, context=2048, images=1)


class OnTpu(Unconstrained):
    platform = "tpu"


def shapes(B: int, T: int, K: int, G: int, H: int, S: int) -> tuple[tuple[int, ...], ...]:
    """Of q, k, v, and of the queries' positions."""
    return (B, T, K, G, H), (B, K, S, H), (B, K, S, H), (B, T)


# What one device of eight has of the 90B, and what the model that ships has.
CASES: dict[str, tuple[Callable, tuple[tuple[int, ...], ...]]] = {
    "vision": (lambda spans: None, shapes(1, 6432, 2, 1, 88, 6432)),
    "a prompt from its beginning": (lambda spans: UpTo(2048, first=True), shapes(1, 2048, 1, 8, 128, 2048)),
    "a later part of a prompt": (lambda spans: UpTo(8192), shapes(1, 2048, 1, 8, 128, 8192)),
    "text to tiles": (lambda spans: InSpan(spans, 1601, 1608), shapes(1, 2048, 1, 8, 128, 6432)),
    "one token a row": (lambda spans: UpTo(8192), shapes(8, 1, 1, 8, 128, 8192)),
    "one token a row to tiles": (lambda spans: InSpan(spans, 1601, 1608), shapes(8, 1, 1, 8, 128, 6432)),
    "narrow heads": (lambda spans: UpTo(384), shapes(2, 1, 2, 2, 32, 384)),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", CASES)
def test_the_compiler_takes_each_kernel(name: str, chip: str) -> None:
    """And what is around it copies no cache."""
    visible, (q, k, v, queries) = CASES[name]
    placed = SingleDeviceSharding(topology(chip).compile_devices()[0])
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed) for shape in (q, k, v)]
    args += [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed) for shape in (queries, (q[0], 4, 2))]

    @jax.jit
    def run(q: Any, k: Any, v: Any, queries: Any, spans: Any) -> jax.Array:
        return attention(q, k, v, queries, visible(spans), constrain=OnTpu())

    compiled = compile_program(run.lower(*args))
    assert compiled.text.count(KERNEL) == 1
    if name.startswith("one token"):
        assert not Program(compiled.text).copies(2 * k[0] * k[1] * k[2] * k[3])


def small(layers: int) -> Any:
    """The 90B at full width with few layers, in the vision tower too, and few words: sampling takes long to compile."""
    config = shallow(PRESETS["90b-instruct"], layers)
    vision = dataclasses.replace(config.vision, layers=2, global_layers=1, taps=(0,))  # pyright: ignore
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab=1024), vision=vision)


@pytest.mark.parametrize(("name", "kernels"), [("encode", 3), ("prefill", 4), ("decode", 4)])
def test_programs_gain_by_them(name: str, kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same collectives, arguments and copies as with XLA's attention, and no more temporaries."""

    def made() -> Compiled:
        programs = programs_on(small(4), topology("v6e:2x4"), "serve")
        return compile_program(programs.encode() if name == "encode" else getattr(programs, name)(LOAD))

    ours = made()
    jax.clear_caches()
    monkeypatch.setattr(Rules, "platform", "cpu")
    plain = made()
    jax.clear_caches()
    assert (ours.text.count(KERNEL), plain.text.count(KERNEL)) == (kernels, 0)
    assert ours.collectives == plain.collectives
    assert ours.arguments == plain.arguments
    assert ours.temporaries <= plain.temporaries + 2**20
