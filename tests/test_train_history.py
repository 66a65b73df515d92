"""What a run tells while it goes on, and by what its speed is measured."""

from __future__ import annotations

import functools
import io
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from mllama_jax.model.mllama import MllamaModel, abstract_parameters
from mllama_jax.sharding.mesh import topology
from mllama_jax.train import history
from mllama_jax.train.flops import step_flops
from mllama_jax.train.history import History
from mllama_jax.train.measure import random_batch
from mllama_jax.train.objective import Frozen, part_loss
from mllama_jax.train.parts import Lora, Part, lora_shapes, split
from mllama_jax.train.recipe import Recipe
from mllama_jax.train.step import Report
from tests.conftest import TINY


def recipe(part: Part = "lora") -> Recipe:
    return Recipe(model="", data="", part=part, steps=3, samples=4, length=32, dtype="float32", lora=Lora(rank=1))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads: by name, steps and values."""
    found: dict[str, list[tuple[int, float]]] = {}
    (file,) = folder.iterdir()
    content, place = file.read_bytes(), 0
    while place < len(content):
        (size,) = struct.unpack_from("<Q", content, place)
        event = vars(event_pb2)["Event"].FromString(content[place + 12 : place + 12 + size])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        place += 16 + size
    return found


def test_each_step_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the terminal and in a file; a run that goes on forgets what came behind its checkpoint."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    chip = topology("v5p:2x2x1")
    monkeypatch.setattr(history, "topology_of", lambda devices: chip)
    monkeypatch.setattr(history.jax, "local_devices", lambda: [Device()])
    batches = random_batch(TINY, recipe())
    for begun in (0, 1):
        with History(str(tmp_path), recipe(), begun, TINY) as told:
            for step in range(begun + 1, 4):
                report = Report(jnp.float32(1 / step), jnp.float32(2), jnp.float32(128))
                told.add(step, batches, report, 0.5 if step == 3 else None)
    lines = [json.loads(each) for each in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [each["step"] for each in lines] == [1, 2, 3]
    for each in lines:
        assert each["loss"] == pytest.approx(1 / each["step"])
        assert each["tokens_per_second"] * each["seconds"] == pytest.approx(4 * 32)
        work = each["mfu"] * each["seconds"] * chip.chip.flops * 4
        assert work == pytest.approx(step_flops(TINY, recipe(), batches))
        assert each["peak_memory"] == 3 * 2**30
    summary = told.summary()
    assert (summary["steps"], summary["resumed"], summary["held_out_loss"]) == (3, 1, 0.5)
    for word in ("loss=0.3333", "held_out_loss=0.5", "tokens_per_second=", "mfu=", "memory=3.0 GiB"):
        assert word in terminal.getvalue()
    assert (tmp_path / "history.png").stat().st_size > 10_000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Device:
    def memory_stats(self) -> dict[str, int]:
        return {"peak_bytes_in_use": 3 * 2**30}


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    batches = random_batch(TINY, recipe())
    with History(str(tmp_path), recipe(), 0, TINY) as told:
        for step in (1, 2):
            told.add(step, batches, Report(jnp.float32(step), jnp.float32(2), jnp.float32(128)), None)
    found = scalars(tmp_path / "events")
    assert found["loss"] == [(1, 1.0), (2, 2.0)]
    assert found.keys() == {"loss", "gradient_norm", "learned_tokens", "tokens_per_second", "seconds"}


@pytest.mark.parametrize("part", ["adapter", "lora", "full"])
def test_operations_are_those_of_the_step(part: Part) -> None:
    """But for the padding of tiles, here a third, and positions that causal attention masks."""
    model, batches = MllamaModel(TINY), random_batch(TINY, recipe(part))
    trained, frozen = split(nn.unbox(abstract_parameters(TINY)), TINY, part)
    if part == "lora":
        trained = nn.unbox(lora_shapes(TINY, recipe().lora))
    loss = functools.partial(part_loss, recipe(part), model)
    batch = jax.tree.map(lambda each: each[0], batches)
    traced = jax.make_jaxpr(lambda t, f: jax.grad(loss, has_aux=True)(t, Frozen(f), batch))(trained, frozen)
    again = 2 * TINY.text.vocab * TINY.text.width * batch.tokens.size  # logits, in the backward pass
    ratio = (products(traced.jaxpr) - again) / step_flops(TINY, recipe(part), batches)
    assert 1 <= ratio < 1.35


def products(jaxpr: Any) -> float:
    """Operations of all matrix products in a program."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * inner
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                times = equation.params["length"] if equation.primitive.name == "scan" else 1
                total += times * products(getattr(inner, "jaxpr", inner))
    return total


def is_program(x: Any) -> bool:
    """Whether a parameter of an equation is a jaxpr, closed or not."""
    return hasattr(x, "jaxpr") or hasattr(x, "eqns")
