"""Will training fit a slice: the step, on abstract arrays, compiled for devices that nobody has."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mllama_jax.config import MllamaConfig
from mllama_jax.model.layers import REMAT
from mllama_jax.model.mllama import MllamaModel, Params
from mllama_jax.sharding.mesh import CHIPS, Topology
from mllama_jax.sharding.plan import check_load, programs_on
from mllama_jax.sharding.programs import DoesNotFit, Workload, compile_program
from mllama_jax.sharding.resolve import device_bytes, resolve
from mllama_jax.sharding.rules import Rules
from mllama_jax.train.batch import Batch
from mllama_jax.train.flops import step_flops
from mllama_jax.train.objective import Frozen, optimizer_of, part_loss
from mllama_jax.train.parts import Part, lora_shapes, split
from mllama_jax.train.recipe import Recipe
from mllama_jax.train.step import TrainState, train_step


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """A training step on a device of `topology`; bytes are of one device.

    Attributes:
        stand_in: the slice that it was compiled for; for GPUs, whose compiler wants one at hand, as many v5p chips.
        load: `slots` rows a batch, of `context` tokens, each with `images` pictures of all tiles.
        frozen, trained: bytes of the parameters that are not trained, and of those that are, with their moments.
        temporaries: what the step needs beside, its code included; where it does not fit, what the compiler asks for.
        flops: operations of a step on all devices.
        seconds: what such a step takes at least.
        compiling: what compiling took.
    """

    topology: str
    cloud: str
    chips: int
    devices: int
    preset: str
    mesh: dict[str, int]
    stand_in: str
    part: Part
    load: Workload
    usable: int
    frozen: int
    trained: int
    temporaries: int
    needed: int
    fits: bool
    flops: float
    seconds: float
    compiling: float | None


def train_plan(
    config: MllamaConfig, topology: Topology, load: Workload, part: Part, preset: str, group: int | None = None
) -> TrainPlan:
    """Plan to train with AdamW, bfloat16 beside float32 for what is trained, layers rematerialised.

    Raises:
        InputError: there is no compiler, or the load cannot be on this slice.
    """
    compiled_for = topology
    if topology.chip.platform != "tpu":
        v5p = CHIPS["v5p"]
        compiled_for = Topology(v5p, next(shape for shape in v5p.shapes if math.prod(shape) == topology.devices))
    programs = programs_on(config, compiled_for, preset, group)
    check_load(programs, load)
    rules = programs.rules
    recipe = Recipe(model="", data="", part=part, steps=1000, samples=load.slots, length=load.context)
    state, frozen, batch = abstract_arguments(config, rules, recipe, load.images)
    model = MllamaModel(config, jnp.dtype(recipe.dtype), rules, REMAT[recipe.remat])
    step: Any = train_step(functools.partial(part_loss, recipe, model), optimizer_of(recipe))
    held, own = device_bytes(frozen), device_bytes(state)
    usable = int(topology.chip.hbm)
    try:
        compiled = compile_program(step.lower(state, frozen, batch))
        temporaries, fits, compiling = compiled.temporaries + compiled.code, True, round(compiled.seconds, 1)
    except DoesNotFit as error:
        temporaries, fits, compiling = error.temporaries(held + own), False, None
    needed = held + own + temporaries
    flops = step_flops(config, recipe, batch)
    return TrainPlan(
        topology=topology.name,
        cloud=topology.cloud,
        chips=topology.chips,
        devices=topology.devices,
        preset=preset,
        mesh=dict(rules.mesh.shape),
        stand_in=compiled_for.name,
        part=part,
        load=load,
        usable=usable,
        frozen=held,
        trained=own,
        temporaries=temporaries,
        needed=needed,
        fits=fits and needed <= usable,
        flops=flops,
        seconds=flops / topology.devices / topology.chip.flops,
        compiling=compiling,
    )


def abstract_arguments(
    config: MllamaConfig, rules: Rules, recipe: Recipe, images: int
) -> tuple[TrainState, Frozen, Batch]:
    """What a step takes, as `jax.ShapeDtypeStruct` with shardings, of one batch."""

    def array(shape: tuple[int, ...], dtype: Any, *names: str | None) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=rules.sharding(*names))

    params, frozen = split(resolve(config, rules, jnp.dtype(recipe.dtype)), config, recipe.part)
    if recipe.part == "lora":
        params: Params = jax.tree.map(
            lambda leaf: array(leaf.value.shape, "float32", *leaf.names),
            lora_shapes(config, recipe.lora),
            is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
        )
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), params)
    optimizer = optimizer_of(recipe)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: array(leaf.shape, leaf.dtype),
    )
    rows, vision = recipe.samples, config.vision
    tiles, tile = (vision.max_tiles, vision.tile) if vision is not None else (0, 0)
    text = array((1, rows, recipe.length), "int32", None, "batch")
    batch = Batch(
        text,
        text,
        array((1, rows * images, tiles, 3, tile, tile), "uint8", None, "images"),
        array((1, rows * images), "int32", None, "images"),
        array((1, rows, images * tiles, 2), "int32", None, "batch"),
    )
    return TrainState(array((), "int32"), params, moments), Frozen(frozen), batch
